"""Tensors that a fit found, held as one hashable value."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


class Fitted(Mapping[str, Tensor]):
    """Named tensors, equal and hashed by content; copied on entry, so that they cannot change underneath."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = {k: v.detach().clone().contiguous() for k, v in sorted(tensors.items())}
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
