"""A model in eval mode for as long as somebody looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for the length of a `with`; then each of its parts trains or rests as it did."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was
