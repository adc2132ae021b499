"""Patches of an image as a map of channels, as convolutions take it, and weights for these."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.method import Method
from heedful.kit.patches import patch_tokens, sides, whole_image


def feature_map(method: Method, call: Call, x: Tensor) -> Tensor:
    """The patches of tokens `x [b n e]` as `[b e rows cols]`; what is no image that sees itself whole is refused."""
    if not whole_image(call):
        rule = "acts on rows and columns of patches that all see one another; restrict it to layers that read such"
        raise SiteError(f"{method!r}, layer {call.layer}: {rule}")
    return x[:, patch_tokens(method, call)].mT.unflatten(-1, sides(call))


def laid_back(method: Method, call: Call, image: Tensor, x: Tensor) -> Tensor:
    """Tokens `x [b n e]` with the patches of a map in their places."""
    return x.index_copy(1, patch_tokens(method, call), image.flatten(2).mT.to(x.dtype))


def drawn(random: torch.Generator, *shape: int) -> Tensor:
    """A weight as torch.nn.Linear and torch.nn.Conv2d draw it: evenly, up to one over the root of what it adds up."""
    return _evenly(random, shape, math.prod(shape[1:]))


def with_bias(random: torch.Generator, name: str, *shape: int) -> dict[str, Tensor]:
    """The same, and a bias as they draw that."""
    fan = math.prod(shape[1:])
    return {name: _evenly(random, shape, fan), f"{name}_bias": _evenly(random, shape[:1], fan)}


def _evenly(random: torch.Generator, shape: tuple[int, ...], fan: int) -> Tensor:
    return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(fan)
