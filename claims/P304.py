"""Clipped softmax: do the attention blocks' outputs have fewer outliers?"""

from __future__ import annotations

import math

from claims._tiny_lm import outliers
from claims.ledger import Claim, run
from heedful.core.method import Method
from heedful.methods.mechanisms.normalise.clipped_softmax import ClippedSoftmax

STEPS = 200


def compare(method: Method, seed: int) -> tuple[float, dict[str, float]]:
    """Log of plain kurtosis over the method's, after the same training."""
    plain, other = outliers(None, seed, STEPS), outliers(method, seed, STEPS)
    numbers = {f"softmax, {k}": v for k, v in plain.items()} | {
        f"{type(method).__name__}, {k}": v for k, v in other.items()
    }
    return math.log(plain["kurtosis"] / other["kurtosis"]), numbers


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return compare(ClippedSoftmax(gamma=-0.025), seed)


CLAIM = Claim(
    key="P304",
    method="ClippedSoftmax",
    says="Heads that can do nothing need no outliers: kurtosis of attention outputs falls, and 8 bits suffice.",
    paper_number="authors' repository: BERT perplexity 4.54, in 8 bits 4.66 (variant unstated)",
    setup=f"A 2-layer byte model trained {STEPS} steps on Python's documentation, 128 bytes a text, gamma -0.025; "
    "kurtosis of the attention blocks' outputs on held-out text, mean over layers. Details: loss in "
    "floating point and in 8 bits.",
    effect="log of softmax's kurtosis over the method's",
    measure=measure,
    strong=math.log(2),
)

if __name__ == "__main__":
    run(CLAIM)
