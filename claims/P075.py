"""Super attention: does a map over places make attention better?"""

from __future__ import annotations

from claims._fewer_maps import SETUP, accuracies
from claims.ledger import Claim, run


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = accuracies(seed)
    return found["accuracy, super"] - max(found["accuracy, softmax"], found["accuracy, efficient"]), found


CLAIM = Claim(
    key="P075",
    method="SuperAttention",
    says="Values that are made by a map over places make attention better than softmax attention.",
    paper_number="up to 17 % better (abstract)",
    setup=f"{SETUP} Without its map over places it is the efficient one.",
    effect="accuracy above the better of softmax attention and the same without the map over places",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
