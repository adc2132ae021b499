"""What heads write into the stream: a layer's output projection, by head, times what its block scales attention by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from heedful.core.method import FitContext


def written(context: FitContext, layers: Iterable[int]) -> dict[str, Tensor]:
    """Maps "o.<layer>" `[e h d]` and what is added whatever the heads say, "b.<layer>" `[e]`."""
    found: dict[str, Tensor] = {}
    for layer in layers:
        weights, scale = context.weights(layer), context.scale(layer)
        o = weights.o.float()
        bias = o.new_zeros(len(o)) if weights.o_bias is None else weights.o_bias.float()
        scale = torch.ones_like(bias) if scale is None else scale.float()
        found |= {f"o.{layer}": scale[:, None, None] * o, f"b.{layer}": scale * bias}
    return found
