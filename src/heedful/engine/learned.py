"""The parameters that a stack brings, and what they are called in a model."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from torch import Tensor

from heedful.core.method import Layer, Method, Stack

PREFIX = "heedful_"


class Learned(NamedTuple):
    """One parameter of one part in one layer."""

    part: int
    layer: int
    name: str  # as the method calls it
    full: str  # as the attention module does
    start: Tensor


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
