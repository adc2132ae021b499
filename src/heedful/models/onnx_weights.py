"""Weights out of an ONNX file, which is read as what it is, nested records: nothing else of the format is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from heedful.core.errors import ModelError

# numbers of the fields in onnx.proto
_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _OUTPUT, _OP = 1, 2, 4
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
_FLOAT32 = 1


def weights_of(path: Path) -> dict[str, Tensor]:
    """Every float32 weight by its name.

    Exporters turn the matrix of a linear layer round and call it by a number: what is multiplied before a named bias is
    added is given under the bias's name, turned back.
    """
    try:
        graph = _Record(next(value for number, value in _fields(path.read_bytes()) if number == _GRAPH))
        found = dict(_tensor(x) for x in map(_Record, graph[_INITIALIZER]) if x[_TYPE] == [_FLOAT32])
        nodes = list(map(_Record, graph[_NODE]))
        made = {_text(name): node for node in nodes for name in node[_OUTPUT]}
        for node in nodes:
            if node[_OP] != [b"Add"]:
                continue
            names = [_text(name) for name in node[_INPUT]]
            for bias, other in (names, names[::-1]):
                product = made.get(other)
                if not bias.endswith(".bias") or product is None or product[_OP] != [b"MatMul"]:
                    continue
                matrix = _text(product[_INPUT][1])
                if matrix in found:
                    found[f"{bias.removesuffix('bias')}weight"] = found[matrix].T.contiguous()
    except (ValueError, LookupError, TypeError, RuntimeError, StopIteration) as error:
        raise ModelError(f"{path.name}: is no ONNX file with its weights inside") from error
    return found


class _Record:
    """A record's fields by number, each a list, since any may stand several times."""

    def __init__(self, data: bytes | int) -> None:
        self._fields: dict[int, list[bytes | int]] = {}
        for number, value in _fields(_bytes(data)):
            self._fields.setdefault(number, []).append(value)

    def __getitem__(self, number: int) -> list[bytes | int]:
        return self._fields.get(number, [])


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a record as protocol buffers write them: a number, and a whole number or bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"a field of kind {kind} at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number in sevens of bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where bytes belong")
    return value


def _text(value: bytes | int) -> str:
    return _bytes(value).decode()


def _tensor(record: _Record) -> tuple[str, Tensor]:
    (raw,) = map(_bytes, record[_RAW])
    shape = [n for value in record[_DIMS] for n in ([value] if isinstance(value, int) else _packed(value))]
    if len(raw) != 4 * math.prod(shape):
        raise ValueError("weights that do not fill their shape")
    numbers = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    return _text(record[_NAME][0]), numbers.reshape(shape)


def _packed(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value
