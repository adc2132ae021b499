"""PWCA: does a model that another image distracted in training name digits better, where it has seen few of them?"""

from __future__ import annotations

from claims._digits import taught
from claims.ledger import Claim, run
from heedful.methods import PairwiseCrossAttention

STEPS, FEW = 200, 200

WAYS = {"alone": PairwiseCrossAttention(0.0), "pairs": PairwiseCrossAttention()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"accuracy, {name}": taught(what, seed, STEPS, few=FEW)[1] for name, what in WAYS.items()}
    return 100 * (found["accuracy, pairs"] - found["accuracy, alone"]), found


CLAIM = Claim(
    key="P268_pairs",
    method="PairwiseCrossAttention",
    says="A model of few images names others better if it was distracted by another image while it trained.",
    paper_number="DeiT-Tiny +2.5 points on CUB-200-2011, with the half that stays (paper)",
    setup=f"A vision transformer of four layers, {STEPS} steps on {FEW} of scikit-learn's digits, in one of nine "
    "places each time: half of the images of a batch see another one too, or none does. Accuracy on a held-out third, "
    "another one each seed. The first run, not changed after it was seen.",
    effect="points of accuracy above training without another image",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
