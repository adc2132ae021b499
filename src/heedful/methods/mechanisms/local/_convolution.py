"""What light and dynamic convolutions share: the gated projections, and the windows over the latest tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn.functional import glu, linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, SiteError

KERNELS = (3, 7, 15, 31)  # tokens by layer, the last for all further ones; the papers' models


PAPER = Paper(
    "P255",
    "Pay Less Attention with Lightweight and Dynamic Convolutions",
    "Felix Wu, Angela Fan, Alexei Baevski, Yann Dauphin, Michael Auli",
    2019,
    "1901.10430",
    "ICLR 2019",
    differs=(
        "No weights of the kernels are dropped in training (the authors' DropConnect).",
        "There are as many kernels as the layer has heads unless `heads` says otherwise; the authors have 16.",
        "First weights come from a generator seeded by the layer's number and do not touch the global one; the map "
        "that predicts kernels is drawn as all others are, where the authors' code draws it as torch.nn.Linear does.",
    ),
)


class Convolution(Method, abstract=True):
    """A block of gated convolutions over the latest tokens, whose kernels channels share."""

    # tokens by layer, the last for all further ones; the paper: 3, 7, 15, 31
    kernels: Annotated[tuple[PositiveInt, ...], MinLen(1)] = KERNELS
    heads: int | None = None  # kernels that the channels share; None: the layer's heads; the paper: 16

    def kernel(self, layer: int) -> int:
        """How many tokens a kernel of the layer reaches."""
        return self.kernels[min(layer, len(self.kernels) - 1)]

    def shared_by(self, layer: Layer) -> int:
        """How many kernels the channels share."""
        found = layer.heads if self.heads is None else self.heads
        if found < 1 or layer.width % found:
            raise FieldError(self, "heads", found, f"must be 1 or more and divide the {layer.width} channels", 1)
        return found


def drawn(random: torch.Generator, *shape: int) -> Tensor:
    """Evenly from minus to plus sqrt(6 / (fan in + fan out)), as the authors' code draws most weights."""
    rest = math.prod(shape[2:])
    return (2 * torch.rand(shape, generator=random) - 1) * math.sqrt(6 / ((shape[0] + shape[1]) * rest))


def projections(random: torch.Generator, width: int) -> dict[str, Tensor]:
    """The two linear maps around a convolution, from e to 2 e channels and from e to e."""
    return {
        "in": drawn(random, 2 * width, width), "in_bias": torch.zeros(2 * width),
        "out": drawn(random, width, width), "out_bias": torch.zeros(width),
    }  # fmt: skip


def convolved(x: Tensor, call: Call, kernel: int, predicted: Callable[[Tensor], Tensor]) -> Tensor:
    """The block's output. `predicted` makes kernels before their softmax `[b|1 n|1 h kernel]` of gated tokens."""
    inner = glu(linear(x, call.params["in"], call.params["in_bias"]), -1)
    scores = predicted(inner)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(inner)
    windows = _windows(inner, call, kernel).unflatten(2, (weights.shape[2], -1))  # [b n h e/h kernel]
    mixed = (windows @ weights[..., None]).flatten(2)
    return linear(mixed, call.params["out"], call.params["out_bias"])


def _windows(inner: Tensor, call: Call, kernel: int) -> Tensor:
    """What a kernel reaches from each token, oldest first, `[b n e kernel]`: zeros where there is no text."""
    left = kernel - 1 if call.mask.causal else (kernel - 1) // 2
    joined = torch.cat([_before(inner, call, left), inner], 1)
    place = None
    if call.queries.is_filled is not None:  # padding goes before all that came before, where no window sees it
        text = torch.nn.functional.pad(call.is_text[:, 0].expand(inner.shape[:2]), (left, 0), value=True)
        order = text.long().argsort(dim=1, stable=True)
        joined = joined.gather(1, order[..., None].expand_as(joined))
        place = (order.argsort(1)[:, left:] - left).clamp(min=0)
    if call.mask.causal:
        call.state.cache["inputs"] = joined[:, joined.shape[1] - left :]
        end = (call.queries.first or 0) + inner.shape[1]
        call.state.cache["end"] = torch.full((len(inner),), end, device=inner.device)
    windows = torch.nn.functional.pad(joined, (0, 0, 0, kernel - 1 - left)).unfold(1, kernel, 1)
    if place is None:
        return windows
    return windows.gather(1, place[..., None, None].expand(-1, -1, *windows.shape[2:]))


def _before(inner: Tensor, call: Call, left: int) -> Tensor:
    """The gated tokens that earlier calls left, `[b left e]`; zeros before the text."""
    first = call.queries.first or 0
    if first == 0 or not call.mask.causal:
        return inner.new_zeros(len(inner), left, inner.shape[2])
    end = call.state.cache.get("end")
    if end is None or int(end.max()) != first:
        read = "no" if end is None else int(end.max())
        raise SiteError(
            f"layer {call.layer}: a convolution goes on from token {first}, and holds what came before {read} token; "
            "was the cache cut back or made without it? Read the text again from its start"
        )
    return call.state.cache["inputs"]
