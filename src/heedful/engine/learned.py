"""The parameters that a stack brings, and what they are called in a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

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


def learned(stack: Stack, sizes: Iterable[Layer]) -> list[Learned]:
    """All parameters of a stack, fresh, in layers of these sizes."""
    return [
        Learned(number, size.number, name, planted_name(method, number, name), start)
        for size in sizes
        for number, method in enumerate(stack.methods)
        if any(step.number == number for step in stack.steps(size.number))
        for name, start in method.parameters(size).items()
    ]
