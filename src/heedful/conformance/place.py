"""Where laws are tried: on the CPU, unless `check(method, device="cuda")` says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

CPU = torch.device("cpu")
_HERE: ContextVar[torch.device | None] = ContextVar("where laws are tried", default=None)


def place() -> torch.device:
    """The device of all that a law makes."""
    return _HERE.get() or CPU


def reseeded() -> None:
    """What is drawn from here on is drawn the same every time."""
    if place() == CPU:
        torch.default_generator.manual_seed(0)  # torch.manual_seed asks for devices that are not here, and that is slow
    else:
        torch.manual_seed(0)


@contextmanager
def on(device: torch.device | str) -> Iterator[None]:
    before = _HERE.set(torch.device(device))
    try:
        yield
    finally:
        _HERE.reset(before)
