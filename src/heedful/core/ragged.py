"""Something of heads of unlike length: held flat, and seen as padded by whoever computes with it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map


class Ragged(Tensor):
    """`[b g k ...]` without storage: `flat [t ...]` holds the entries head after head, `counts` how many each has.

    Heads are padded on the left. Any operator gets the padded copy, which is made when it is first wanted and lives as
    long as this does; a kernel that knows better reads `flat`.
    """

    flat: Tensor
    counts: Sequence[int]
    _whole: Tensor | None

    # attributes are read without a detour through Python
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, flat: Tensor, heads: tuple[int, int], counts: Sequence[int]) -> Ragged:
        shape = (*heads, max(counts), *flat.shape[1:])
        out = Tensor._make_wrapper_subclass(cls, shape, dtype=flat.dtype, device=flat.device)
        out.flat, out.counts, out._whole = flat, counts, None
        return out

    @property
    def whole(self) -> Tensor:
        """The padded copy."""
        if self._whole is None:
            self._whole = pad(self.flat, tuple(self.shape[:2]), self.counts)
        return self._whole

    @property
    def table(self) -> Tensor:
        """Of each head in turn: the row of `flat` where its column 0 would lie, and the first column that it holds."""
        longest, ends = max(self.counts), itertools.accumulate(self.counts)
        return torch.tensor([x for end, n in zip(ends, self.counts, strict=True) for x in (end - longest, longest - n)])

    # what torch refuses to tensors without storage

    def tolist(self) -> Any:
        return self.whole.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        return self.whole.numpy(force=force)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.whole, memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Ragged({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable and args and isinstance(args[0], Ragged):
            raise TypeError(f"{func}: keys and values of a cache cannot be changed in place; make new tensors")
        return func(*tree_map(padded, args), **tree_map(padded, kwargs or {}))


def padded(x: Any) -> Any:
    """The tensor that a `Ragged` stands for; anything else as it is."""
    return x.whole if isinstance(x, Ragged) else x


def pad(flat: Tensor, heads: tuple[int, ...], counts: Sequence[int]) -> Tensor:
    """`[t ...]` as `[b g k ...]`, with the entries of each head on the right."""
    return pad_sequence(list(flat.split(list(counts))), True, padding_side="left").unflatten(0, heads)


def spread(flat: Tensor, heads: tuple[int, int], counts: Sequence[int]) -> Tensor:
    """`[t ...]` as `[b g k ...]`: a view where heads are alike, and otherwise padded only when somebody looks."""
    longest = max(counts, default=0)
    if flat.shape[0] == longest * len(counts):
        return flat.view(*heads, longest, *flat.shape[1:])
    if torch.is_grad_enabled() and flat.requires_grad:
        return pad(flat, heads, counts)
    return Ragged(flat, heads, counts)
