"""Rows of a cache that are held in less memory than a tensor of them takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


class Packed(ABC):
    """Rows `[t d]` of keys or of values in a form of their own, from which they can be had back. Never changed."""

    @property
    @abstractmethod
    def form(self) -> Hashable:
        """What two of a class must share to be joined."""

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The rows, `[t d]`."""

    @abstractmethod
    def take(self, which: Tensor) -> Self:
        """The rows of these numbers, in this order."""

    @abstractmethod
    def join(self, more: Self) -> Self:
        """These rows and then those."""


@dataclass(frozen=True, eq=False)
class Plain(Packed):
    """Rows as they are."""

    rows: Tensor  # [t d]

    @property
    def form(self) -> Hashable:
        return self.rows.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def tensor(self) -> Tensor:
        return self.rows

    def take(self, which: Tensor) -> Plain:
        return Plain(self.rows[which])

    def join(self, more: Plain) -> Plain:
        return Plain(torch.cat([self.rows, more.rows]))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows `[t d]` in parts of several forms, and for each row the part that it lies in; a part's rows are in order."""

    parts: tuple[Packed, ...]
    part: Tensor  # [t], uint8
    width: int  # d
    dtype: torch.dtype

    @staticmethod
    def of(rows: Tensor) -> Rows:
        part = torch.zeros(len(rows), dtype=torch.uint8, device=rows.device)
        return Rows((Plain(rows),), part, rows.shape[1], rows.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.part), self.width

    @property
    def device(self) -> torch.device:
        return self.part.device

    def tensor(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for number, part in enumerate(self.parts):
            out[self.part == number] = part.tensor().to(self.dtype)
        return out

    def take(self, which: Tensor) -> Rows:
        """The rows of these numbers, in this order."""
        part = self.part[which]
        parts = []
        for number, held in enumerate(self.parts):
            mine = self.part == number
            places = (mine.cumsum(0) - 1)[which[part == number]]
            parts.append(held if _all_in_order(places, len(held)) else held.take(places))
        return Rows(tuple(parts), part, self.width, self.dtype)

    def join(self, more: Packed) -> Rows:
        """These rows and then those, in the first part of their form, or one more."""
        alike = [i for i, x in enumerate(self.parts) if type(x) is type(more) and x.form == more.form]
        number = alike[0] if alike else len(self.parts)
        parts = (*self.parts, more) if not alike else tuple(
            x.join(more) if i == number else x for i, x in enumerate(self.parts)
        )  # fmt: skip
        part = torch.cat([self.part, self.part.new_full((len(more),), number)])
        return Rows(parts, part, self.width, self.dtype)

    def put(self, those: Tensor, packed: Packed) -> Rows:
        """The same rows, of which `those [t]` are held as `packed`, in their order."""
        number = torch.arange(len(self.part), device=self.device)
        others, count = number[~those], len(number) - len(packed)
        order = torch.empty_like(number)
        order[others] = torch.arange(count, device=self.device)
        order[those] = torch.arange(count, len(number), device=self.device)
        return self.take(others).join(packed).take(order)


def _all_in_order(places: Tensor, count: int) -> bool:
    return len(places) == count and torch.equal(places, torch.arange(count, device=places.device))


@dataclass(frozen=True, eq=False)
class Packing:
    """What a CACHE edit may give instead of new keys or values: some of them packed, and the others as they were."""

    those: Tensor  # [b g k], bool
    rows: Packed  # of `those`, head after head

    def over(self, x: Tensor) -> Tensor:
        """`x [b g k d]` with what the packed rows give back in their places."""
        out = x.clone()
        out[self.those] = self.rows.tensor().to(x.dtype)
        return out

    def among(self, heads: list[int]) -> Packing:
        """The same for these of the g heads alone."""
        chosen = torch.zeros_like(self.those)
        chosen[:, heads] = self.those[:, heads]
        return Packing(chosen, self.rows.take(chosen[self.those].nonzero().flatten()))
