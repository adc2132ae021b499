"""Monotonic location attention: does a copier that goes from place to place write longer strings than in training?"""

from __future__ import annotations

from claims._copier import LONG, TASK, right
from claims.ledger import Claim, run
from heedful import Method
from heedful.methods import EdgePrior, MonotonicLocationAttention

WAYS: dict[str, Method | None] = {
    "content": None,
    "content and distance": EdgePrior(0.0, 3 * LONG[1]),
    "any step": MonotonicLocationAttention("any"),
    "one step": MonotonicLocationAttention("one"),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"{name}, {way}": x for way, method in WAYS.items() for name, x in right(method, seed).items()}
    by_content = max(found["long, content"], found["long, content and distance"])
    return found["long, any step"] - by_content, found


CLAIM = Claim(
    key="P156",
    method="MonotonicLocationAttention",
    says="Attention that goes on from where it looked last writes strings longer than any in training, where attention "
    "by content or by distance does not.",
    paper_number="near-perfect accuracy on copies several times as long as in training (abstract, without numbers)",
    setup=TASK + "attention by content, by content and a learned bias for each distance, by places with any step, and "
    "with steps up to one. The share of words right, each told the right ones before it.",
    effect="share of words right on long sources, any step, less the better of attention by content and with distances",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
