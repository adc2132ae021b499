"""The parameters that a stack brings, and what they are called in a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from heedful.core.entry import Layer
from heedful.core.method import Method, Stack

PREFIX = "heedful_"


class Learned(NamedTuple):
    """One parameter of one part in one layer."""

    part: int
    layer: int
    name: str  # as the method calls it
    full: str  # as the attention module does
    start: Tensor


def moves(start: Tensor) -> bool:
    """Whether gradients move what begins so; a method says no by a parameter that asks for none, as a running mean."""
    return start.requires_grad or not isinstance(start, nn.Parameter)


def fresh(start: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> nn.Parameter:
    """A parameter as wide as a model's weights.

    What no gradient moves is at least single: a mean of a thousand steps moves by less than half precision can tell.
    """
    wide = dtype if moves(start) else torch.promote_types(dtype, torch.float32)
    return nn.Parameter(start.detach().to(device, wide), requires_grad=moves(start))


def planted_name(method: Method, part: int, name: str) -> str:
    """What an attention module calls a parameter."""
    return f"{PREFIX}{type(method).__name__}_{part}_{name}"


class Sized(Protocol):
    """What tells the sizes of layers."""

    @property
    def layer_names(self) -> tuple[str, ...]: ...

    def sizes(self, layers: Collection[int] | None = None) -> tuple[Layer, ...]: ...  # of these, or of all


def learned(stack: Stack, model: Sized) -> list[Learned]:
    """All parameters of a stack, fresh. Layers where nothing is learned are not asked for sizes; some tell none."""
    wanted = [
        layer
        for layer in range(len(model.layer_names))
        if any(type(stack.methods[step.number]).parameters is not Method.parameters for step in stack.steps(layer))
    ]
    return [
        Learned(number, size.number, name, planted_name(method, number, name), start)
        for size in model.sizes(wanted)
        for number, method in enumerate(stack.methods)
        if any(step.number == number for step in stack.steps(size.number))
        for name, start in method.parameters(size).items()
    ]
