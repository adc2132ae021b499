"""BOAT: do parts of patches that are alike, beside windows, name digits better than shifted windows do?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._digits import LAYERS, SIDE, Windows, accuracy
from claims.ledger import Claim, run
from heedful.methods import BOAT

STEPS = 200
SIZE = 3  # of windows; their nine patches are as many as two halvings leave of 36
EVEN, ODD = range(0, LAYERS, 2), range(1, LAYERS, 2)


class _Drawn(BOAT):
    """The control of what parts are made of: as many patches, drawn for each image and head."""

    def order(self, query: Tensor) -> Tensor:
        return torch.rand(query.shape[:3]).argsort(-1)


WAYS = {
    "alike": Windows(SIZE).on(layers=EVEN) | BOAT(2, 0).on(layers=ODD),
    "shifted windows": Windows(SIZE).on(layers=EVEN) | Windows(SIZE, SIZE // 2).on(layers=ODD),
    "drawn": Windows(SIZE).on(layers=EVEN) | _Drawn(2, 0).on(layers=ODD),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {f"accuracy, {name}": accuracy(what, seed, STEPS) for name, what in WAYS.items()}
    best = max(numbers["accuracy, shifted windows"], numbers["accuracy, drawn"])
    return 100 * (numbers["accuracy, alike"] - best), numbers


CLAIM = Claim(
    key="P130",
    method="BOAT",
    says="Patches that see those which are like them, beside windows, name images better than with windows alone.",
    paper_number="none given in the abstract; above Swin and CSWin",
    setup=f"A {LAYERS}-layer vision transformer trained {STEPS} steps on scikit-learn's digits, moved by 0 to 2 of "
    f"{SIDE} x {SIDE} patches; windows of {SIZE} x {SIZE} in every second layer, and in the others parts of nine alike "
    "patches, Swin's shifted windows, or parts that are drawn. The class token is read and not seen. Held-out "
    "accuracy.",
    effect="points of accuracy above the better of shifted windows and drawn parts",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
