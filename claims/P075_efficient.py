"""Halved attention: does it lose nothing without maps to keys and values?"""

from __future__ import annotations

from claims._fewer_maps import SETUP, match
from claims.ledger import Claim, run


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return match("efficient", seed)


CLAIM = Claim(
    key="P075_efficient",
    method="HalvedAttention",
    says="Attention without maps to keys and values, with half of the weights, is as good.",
    paper_number="50 % fewer parameters, no noticeable loss (abstract)",
    setup=f"{SETUP} A match is an accuracy at most 2 % below softmax's.",
    effect="accuracy above that of softmax attention less 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
