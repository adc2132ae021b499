"""Gated heads: does a head that can do nothing by its gate give the first token less?"""

from __future__ import annotations

from claims._sinks import SEEDS, parked_less, setup
from claims.ledger import Claim, run
from claims.P304_gated import GATED


def measure(seed: int) -> tuple[float, dict[str, float]]:
    return parked_less(GATED, SEEDS + seed)  # on other seeds than those that brought the question up


CLAIM = Claim(
    key="P304_sinks",
    method="GatedHeads",
    says="Heads park on tokens that mean nothing in order to do nothing; where a gate lets them, they need not.",
    paper_number="attention patterns of BERT and ViT, shown and not counted",
    setup=setup(
        f"mean gate {GATED.start:g} at the start, seeds 8 to 15: the claim about outliers, on seeds 0 to 7, found "
        "fewer sinks by the way, and this one asks whether that holds on others",
        "resting",
    ),
    effect="share of weights on the first token where nothing is to be copied, softmax minus gated heads",
    measure=measure,
    seeds=SEEDS,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
