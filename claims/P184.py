"""Neighborhood attention: does a window around each patch name digits better than fixed windows of the same size?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._digits import LAYERS, SIDE, Reads, Windows, accuracy
from claims.ledger import Claim, run
from heedful import Site
from heedful.authoring import Call, Layer, Method, at
from heedful.methods import NeighborhoodAttention
from heedful.methods.mechanisms.local._neighbours import Lines

STEPS = 600
SIZE = 3


class _Offsets(Method):
    """A learned bias for each offset of two patches, as neighbourhoods have it, and no narrower mask."""

    paper = Reads.paper

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        table = torch.empty(layer.heads, 2 * SIDE - 1, 2 * SIDE - 1)
        return {"bias": torch.nn.init.trunc_normal_(table, std=0.02)}

    @at(Site.SCORES)
    def lean(self, scores: Tensor, call: Call) -> Tensor:
        return scores + Lines(call).by_offset(call.params["bias"])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    even, odd = range(0, LAYERS, 2), range(1, LAYERS, 2)
    ways = {
        "neighbourhoods": NeighborhoodAttention(SIZE),
        "shifted windows": _Offsets() | Windows(SIZE).on(layers=even) | Windows(SIZE, SIZE // 2).on(layers=odd),
        "all patches": _Offsets(),
    }
    numbers = {f"accuracy, {name}": accuracy(what, seed, STEPS) for name, what in ways.items()}
    return 100 * (numbers["accuracy, neighbourhoods"] - numbers["accuracy, shifted windows"]), numbers


CLAIM = Claim(
    key="P184",
    method="NeighborhoodAttention",
    says="A window that moves with each patch names images better than shifted windows of the same size.",
    paper_number="NAT-Tiny 83.2 % on ImageNet, 1.9 points above Swin",
    setup=f"A {LAYERS}-layer vision transformer trained {STEPS} steps on scikit-learn's digits, moved "
    f"by 0 to 2 of {SIDE} x {SIDE} patches; {SIZE} x {SIZE} neighbourhoods against Swin's windows of that size, "
    "shifted in every second layer, and all patches, each with learned biases of offsets. Held-out accuracy.",
    effect="points of accuracy above shifted windows",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
