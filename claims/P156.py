"""Monotonic location attention: does a copier that goes from place to place write longer strings than in training?"""

from __future__ import annotations

from claims._copier import TASK, beyond_content
from claims.ledger import Claim, run
from heedful.methods import MonotonicLocationAttention

WAYS = {"any step": MonotonicLocationAttention("any"), "one step": MonotonicLocationAttention("one")}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return beyond_content("any step", WAYS, seed)


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
