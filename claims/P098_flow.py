"""AttentionFlow: does it tell better than raw attention which words an encoder's answer rests on?"""

from __future__ import annotations

from dataclasses import replace

from claims import P098
from claims.ledger import run


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return P098.over_raw("flow", seed)


CLAIM = replace(
    P098.CLAIM,
    key="P098_flow",
    method="AttentionFlow",
    effect="Spearman correlation, flow minus raw attention of the last layer",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
