"""DIMAP: are single weights dropped by it missed less than by their size, in each layer or over all of them?"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from claims._scenes import crop, model
from claims.ledger import Claim, run
from heedful import fit, operate
from heedful.methods import DIMAP

SHARE, PICTURES = 0.5, 4


class _Size(DIMAP):
    """Weights by their size, one cut for all layers of a module."""

    def scores(self, flat: Tensor) -> Tensor:
        return flat.double().abs()


class _Even(DIMAP):
    """Weights by their size, the same share of every layer."""

    def scores(self, flat: Tensor) -> Tensor:
        return flat.abs().argsort().argsort().double() / len(flat)


@cache
def _pruned() -> dict[str, Any]:
    return {kind.__name__.strip("_"): operate(model(), fit(kind(SHARE), model(), ())) for kind in (DIMAP, _Size, _Even)}


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.stack([crop(name, draw, 200, 400) for name in ("china", "flower") for _ in range(PICTURES)])
    whole = model()(pixel_values=pixels).last_hidden_state
    found = {
        name: float((small(pixel_values=pixels).last_hidden_state - whole).norm() / whole.norm())
        for name, small in _pruned().items()
    }
    return math.log(min(found["Size"], found["Even"]) / found["DIMAP"]), {f"error, {x}": y for x, y in found.items()}


CLAIM = Claim(
    key="P026",
    method="DIMAP",
    says="Weights that are ranked over a module by their share of what is left of their layer can be dropped at less "
    "cost than by their size.",
    paper_number="half of a Swin-B's weights dropped, before any training: 78.1 % on ImageNet, 15.3 % by size in each "
    "layer (table 3)",
    setup=f"DINOv2-S/14, {SHARE:.0%} of the weights of attention's projections dropped in one shot; relative error of "
    f"the final states of all tokens, on {2 * PICTURES} other crops of two photographs a seed, from the whole model's. "
    "Beside it as many weights by their size, one cut for all layers of a module or one for each layer. The model is "
    "the same for all seeds. The first run, not changed after it was seen.",
    effect="logarithm of the error by size, one cut or one a layer, whichever is less, over DIMAP's",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
