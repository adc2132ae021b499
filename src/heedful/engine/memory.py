"""Telling that memory ran out from whatever else went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from heedful.core.errors import TooLittleMemory

SAID = ("t allocate memory", "not enough memory")  # by torch, in plain RuntimeErrors on a CPU


@contextmanager
def enough_memory(owner: str, field: str, value: object, what: str, good: object) -> Iterator[None]:
    """Say what to do where the machine has too little memory to read something."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(said in str(error) for said in SAID)
        if not out:
            raise
        rule = f"the machine has too little memory to read {what} at once; pass fewer"
        raise TooLittleMemory(owner, field, value, rule, good) from error
