"""Weights out of a CTranslate2 file, in which each stands behind its name and shape."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from heedful.core.errors import ModelError

VERSION = 6
_KINDS = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)


def weights_of(data: bytes, name: str) -> dict[str, Tensor]:
    """Every variable by its name, as it is stored; one that is another's alias is given under both names."""
    try:
        return _Reader(data).variables()
    except (ValueError, LookupError, struct.error, RuntimeError) as error:
        raise ModelError(f"{name}: is no CTranslate2 file of version {VERSION}") from error


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def variables(self) -> dict[str, Tensor]:
        if (version := self._number("I")) != VERSION:
            raise ValueError(f"version {version}")
        self._text()  # what kind of model this is, and the revision of that
        self._number("I")
        found = dict(self._variable() for _ in range(self._number("I")))
        found |= {self._text(): found[self._text()] for _ in range(self._number("I"))}
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes too many")
        return found

    def _variable(self) -> tuple[str, Tensor]:
        name = self._text()
        shape = [self._number("I") for _ in range(self._number("B"))]
        kind, size = _KINDS[self._number("B")], self._number("I")
        if size != kind.itemsize * math.prod(shape):
            raise ValueError(f"{name} does not fill its shape")
        return name, torch.frombuffer(bytearray(self._bytes(size)), dtype=kind).reshape(shape)

    def _text(self) -> str:
        return self._bytes(self._number("H"))[:-1].decode()  # a zero ends it

    def _number(self, form: str) -> int:
        number: Any = struct.unpack(f"<{form}", self._bytes(struct.calcsize(form)))[0]
        return int(number)

    def _bytes(self, size: int) -> bytes:
        found = self.data[self.at : self.at + size]
        if len(found) != size:
            raise ValueError("it ends too early")
        self.at += size
        return found
