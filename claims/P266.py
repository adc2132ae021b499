"""GMM attention: does a copier that moves a few Gaussians on write longer strings than in training?"""

from __future__ import annotations

from claims._copier import LONG, TASK, right
from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import EdgePrior, GMMAttention

WAYS: dict[str, Method | None] = {
    "content": None,
    "content and distance": EdgePrior(0.0, 3 * LONG[1]),
    "Gaussians": GMMAttention(units=32),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"{name}, {way}": x for way, method in WAYS.items() for name, x in right(method, 100 + seed).items()}
    by_content = max(found["long, content"], found["long, content and distance"])
    return found["long, Gaussians"] - by_content, found


CLAIM = Claim(
    key="P266",
    method="GMMAttention",
    says="Attention by Gaussians that only move on keeps its place in texts much longer than those of training, where "
    "attention by content loses it.",
    paper_number="generalises to very long utterances, as natural on shorter ones (abstract, without numbers)",
    setup=TASK + "attention by content, by content and a learned bias for each distance, and by five Gaussians. "
    "The share of words right, each told the right ones before it.",
    effect="share of words right on long sources, Gaussians, less the better of content and with distances",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
