"""WeibullWeights: do query and key projections leave the Gaussian's shape, while the output projection keeps it?"""

from __future__ import annotations

from claims._tiny_lm import Trained
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods.observe.weibull_weights import GAUSSIAN, WeibullWeights

STEPS = 200


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model = Trained(None, seed, STEPS).model
    q, k, v, o = fit(WeibullWeights(), model, ()).shapes.median(0).values.tolist()
    numbers = {
        "median shape, queries": q,
        "median shape, keys": k,
        "median shape, values": v,
        "median shape, output": o,
        "a Gaussian's": GAUSSIAN,
        "output within the paper's band, 1 or 0": float(1.186 <= o <= 1.204),
    }
    return o - (q + k) / 2, numbers


CLAIM = Claim(
    key="P042",
    method="WeibullWeights",
    says="The magnitudes of feed-forward and output weights keep a Weibull shape within 1.186 to 1.204 in every model; "
    "query and key weights fall below it, to 1.10 to 1.16 in models with grouped heads.",
    paper_number="median shape of output and feed-forward within 1.186 to 1.204 over 12 models; queries and keys 0.76 "
    "to 1.16",
    setup=f"The weights of a 2-layer byte model after {STEPS} steps on Python's documentation, another start and other "
    "text each seed; medians over layers. Attention's four projections alone, and far from the paper's sizes and "
    "training. (Measured before on SmolLM2's one set of weights, other halves of its layers standing for seeds, which "
    "are none: +0.037, weaker, with medians near 1.09 for queries, 1.14 for keys and 1.15 for values and output.)",
    effect="shape of the output projection's weights less that of queries' and keys'",
    measure=measure,
    strong=0.04,
)


if __name__ == "__main__":
    run(CLAIM)
