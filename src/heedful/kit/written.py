"""What heads write into the stream: a layer's output projection, by head, times what its block scales attention by."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.kit.seeds import seed_of


class Writes(Protocol):
    """A method that goes by what was written down of a model."""

    @property
    def maps(self) -> Fitted | None: ...

    @property
    def seed(self) -> int | None: ...


def written(context: FitContext, last: int) -> Fitted:
    """Of each list's last layers maps "o.<layer>" `[e h d]`, and what is always added, "b.<layer>" `[e]`."""
    layers = [layer.number for layer in context.layers if layer.highest - layer.number < last]
    found: dict[str, Tensor] = {}
    for layer in layers:
        weights, scale = context.weights(layer), context.scale(layer)
        o = weights.o.float()
        bias = o.new_zeros(len(o)) if weights.o_bias is None else weights.o_bias.float()
        scale = torch.ones_like(bias) if scale is None else scale.float()
        found |= {f"o.{layer}": scale[:, None, None] * o, f"b.{layer}": scale * bias}
    return Fitted(found)


def map_of(owner: Writes, call: Call, h: int, d: int) -> tuple[Tensor, Tensor]:
    """A layer's map and what is added to it, as they were written down; drawn by the owner's seed where none were."""
    if owner.maps is None:
        draw = torch.Generator().manual_seed(4099 * seed_of(owner, "maps", batches="()") + call.layer)
        width = h * d if call.hidden is None else call.hidden.shape[-1]
        return torch.randn(width, h, d, generator=draw), torch.zeros(width)
    found = owner.maps.get(f"o.{call.layer}")
    if found is None or found.shape[1:] != (h, d):
        rule = f"were fitted to another model, or fewer layers: [e, {h}, {d}] is needed in layer {call.layer}"
        raise FieldError(owner, "maps", owner.maps, rule, "a fit to this model")
    return found, owner.maps[f"b.{call.layer}"]
