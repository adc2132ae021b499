"""GatedNorm: does the residual stream have smaller outliers, where softmax's has some?"""

from __future__ import annotations

import math

from claims._sinks import SEEDS, at_no_worse_loss, beside, setup
from claims.ledger import Claim, run
from heedful.methods import GatedNorm

GATED = GatedNorm()
FAULTS = ("resting", "largest")


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = beside(GATED, seed, *FAULTS)
    gain = math.log(found["largest, softmax"] / found["largest, GatedNorm"])
    return at_no_worse_loss(gain, GATED, found), found


CLAIM = Claim(
    key="P314_outliers",
    method="GatedNorm",
    says="Outliers of the residual stream are there to rescale what a norm lets through; with a gate behind the norm "
    "they are gone, and the model is no worse.",
    paper_number="1.2 points lost when weights and activations have 4 bits; 2 points gained on average without",
    setup=setup(f"a gate of rank {GATED.rank}", *FAULTS),
    effect="log of softmax's largest activation over the method's, each over its mean",
    measure=measure,
    seeds=SEEDS,
    strong=math.log(2),
)

if __name__ == "__main__":
    run(CLAIM)
