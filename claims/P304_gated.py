"""Gated heads: do the attention blocks' outputs have fewer outliers?"""

from __future__ import annotations

from dataclasses import replace

from claims import P304
from claims.ledger import run
from heedful.methods.mechanisms.gates.gated_heads import GatedHeads


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return P304.compare(GatedHeads(start=0.25), seed)


CLAIM = replace(
    P304.CLAIM,
    key="P304_gated",
    method="GatedHeads",
    setup=P304.CLAIM.setup.replace("gamma -0.025", "mean gate 0.25 at the start"),
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
