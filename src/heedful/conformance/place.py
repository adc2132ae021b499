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


@contextmanager
def on(device: torch.device | str) -> Iterator[None]:
    before = _HERE.set(torch.device(device))
    try:
        yield
    finally:
        _HERE.reset(before)
