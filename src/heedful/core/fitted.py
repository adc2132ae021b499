"""Tensors as they are kept: what a fit found as one hashable value, and what is alike in them said in few bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from heedful.core.errors import Code, FieldError

ROWS = torch.contiguous_format  # with strides of its own, where `contiguous` leaves those of an axis of one place
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by how many bytes one takes
MOST, TIMES = 2**26, 64  # numbers that few may stand for, however few they are, and each of them besides


class Fitted(Mapping[str, Tensor]):
    """Named tensors, equal and hashed by content; copied on entry, so that they cannot change underneath."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(tensors, Mapping) or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise FieldError(
                "Fitted", "tensors", tensors, "must be tensors by name", {"direction": Code("torch.ones(8)")}
            )
        self._tensors = {k: v.detach().clone(memory_format=ROWS) for k, v in sorted(tensors.items())}
        digest = hashlib.sha256()
        for name, tensor in self._tensors.items():
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
        self.digest = digest.hexdigest()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fitted) and other.digest == self.digest

    def __repr__(self) -> str:
        parts = ", ".join(f"{k} {tuple(v.shape)}" for k, v in self._tensors.items())
        return f"Fitted({parts}; {self.digest[:8]})"

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        save_file(self._tensors, str(path), metadata={"heedful": "fitted"})

    @staticmethod
    def load(path: str | Path) -> Fitted:
        from safetensors.torch import load_file

        return Fitted(load_file(str(path)))


def compact(x: Tensor) -> Tensor:
    """What says the same bit by bit in fewer bytes: an axis along which all is alike once, whole numbers as such."""
    x = narrowed(_bits(x), range(x.ndim)).view(x.dtype)
    if x.numel() and x.dtype in (torch.float64, torch.int64):
        for kind in (torch.uint8, torch.int16, torch.int32):
            ends = torch.iinfo(kind)
            if x.min() >= ends.min and x.max() <= ends.max and torch.equal(_bits(x.to(kind).to(x.dtype)), _bits(x)):
                return x.to(kind).contiguous()
    return x.contiguous().clone()


def _bits(x: Tensor) -> Tensor:
    """The same memory as whole numbers, which tell 0 from -0; what has no whole number of its size as it is."""
    return x.view(WHOLE.get(x.itemsize, x.dtype))


def narrowed(x: Tensor, axes: Iterable[int]) -> Tensor:
    """The same with one place along each of these axes along which all is alike."""
    for axis in axes:
        if x.shape[axis] > 1 and torch.equal(x, x.narrow(axis, 0, 1).expand_as(x)):
            x = x.narrow(axis, 0, 1)
    return x


def as_it_was(few: Tensor, shape: Sequence[int], kind: str) -> Tensor:
    """What was made compact, by what a file says of it; it takes no memory yet for what is alike."""
    wide = getattr(torch, kind)
    if not isinstance(wide, torch.dtype) or [type(n) for n in shape] != [int] * few.ndim:
        raise TypeError(f"{kind} {shape} for {few.ndim} axes")
    if any(n != m and (m != 1 or n < 1) for n, m in zip(shape, few.shape, strict=True)):
        raise ValueError(f"{shape} for {list(few.shape)}")
    return few.to(wide).expand(shape)


def room(tensors: Mapping[str, Tensor]) -> int:
    """For how many numbers these may stand in a file, so that a small one cannot fill the memory."""
    return MOST + TIMES * sum(x.numel() for x in tensors.values())
