"""A model as somebody wants to look at it, and then as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """A `with` that ends in `undo()`: twice, so that an interrupt in the first leaves nothing half undone."""
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for the length of a `with`; then each of its parts trains or rests as it did."""
    training = [(module, module.training) for module in model.modules()]

    def undo() -> None:
        for module, was in training:
            module.training = was

    with undone(undo):
        model.eval()
        yield
