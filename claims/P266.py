"""GMM attention: does a copier that moves a few Gaussians on write longer strings than in training?"""

from __future__ import annotations

from claims._copier import TASK, beyond_content
from claims.ledger import Claim, run
from heedful.methods import GMMAttention


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return beyond_content("Gaussians", {"Gaussians": GMMAttention(units=32)}, 100 + seed)


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
