"""Sigmoid attention, not normalised: does a head that need not give its weights away give the first token less?"""

from __future__ import annotations

from claims._sinks import COURSE, SEEDS, parked_less, setup
from claims.ledger import Claim, run
from heedful.methods import SigmoidAttention

SIGMOID = SigmoidAttention(COURSE.length)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return parked_less(SIGMOID, seed)


CLAIM = Claim(
    key="P025_sigmoid",
    method="SigmoidAttention",
    says="Sinks come of weights that must add up to one: sigmoid attention without normalisation has none.",
    paper_number="none in the abstract; no sinks up to 1B parameters",
    setup=setup(
        "sigmoid with bias -log n and no normalisation against softmax; what heads give the first token is counted "
        "over the sum of their weights, as the authors count where nothing normalises, however small that is; 'sinks' "
        "beside it, a share of texts, takes weights as they are",
        "resting",
    ),
    effect="share of weights on the first token where nothing is to be copied, softmax minus sigmoid",
    measure=measure,
    seeds=SEEDS,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
