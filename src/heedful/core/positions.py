"""Where queries and keys stand, by *position* (number in the text) and *index* (number in the padded row)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def spread_heads(x: Tensor, heads: int) -> Tensor:
    """Spread `[b, g, n]` over the query heads when it differs by key head."""
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)


def taken(x: Tensor, where: Tensor) -> Tensor:
    """The tokens `[b|1 h|1 m]` of something `[b h n d]`, in that order, `[b h m d]`.

    On a CPU torch copies whole rows many times faster than one number after another.
    """
    texts, heads, n, width = x.shape
    at = where + torch.arange(0, texts * heads * n, n, device=x.device).view(texts, heads, 1)
    return x.reshape(-1, width).index_select(0, at.flatten()).view(*at.shape, width)


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the queries or the keys of a call stand. Both tensors are `[b|1, g|1, n]`."""

    index: Tensor
    position: Tensor
    first: int | None = None  # the first index, when the indices are first, first + 1, ...
    pads: tuple[int, int] | None = None  # least and largest index - position, when known
    is_filled: Tensor | None = None  # [b|1, g|1, n]: False for empty cache slots, and for queries that are padding
    last: int | None = None  # of keys without a `first`: an index that no key's is above, where one is known
    filled: Tensor | None = None  # [b|1, g|1]: so many of the last places are the valid ones, where that is known

    def __len__(self) -> int:
        return self.index.shape[-1]

    @cached_property
    def single(self) -> bool:
        """Whether there is one place, as where a text is written token by token."""
        return self.index.shape[-1] == 1

    @cached_property
    def whole(self) -> bool:
        """Whether it is known, without a look at a tensor, that every place is a token of a text."""
        return self.is_filled is None and (self.pads == (0, 0) or self.position is self.index)

    def alike(self, other: Positions) -> bool:
        """Whether it is known, without a look at a tensor, that others stand at the same positions."""
        return self is other or (
            self.first is not None
            and (self.first, len(self), self.pads) == (other.first, len(other), (0, 0))
            and other.pads == (0, 0)
        )

    @property
    def packed(self) -> bool:
        """Whether positions begin anew inside a row, as where several texts share it."""
        return self.pads is None and len(self) > 1 and bool((self.position.diff(dim=-1) < 0).any())

    @staticmethod
    def row(
        start: int,
        n: int,
        device: torch.device | str = "cpu",
        pad: Tensor | None = None,
        is_filled: Tensor | None = None,
    ) -> Positions:
        """`n` places from index `start`; `pad [b]` is the number of padding tokens on the left of each row."""
        index = torch.arange(start, start + n, device=device).view(1, 1, n)
        if pad is None:
            return Positions(index, index, start, (0, 0), is_filled)
        low, high = int(pad.min()), int(pad.max())
        return Positions(index, index - pad[:, None, None], start, (low, high), is_filled)

    @cached_property
    def end(self) -> int:
        """An index that none reaches."""
        if self.first is not None:
            return self.first + len(self)
        return (int(self.index.max()) if self.last is None else self.last) + 1

    def by_position(self, x: Tensor) -> Tensor:
        """Something of these places `[b h n]`, laid out by text position from 0 on; padding is dropped."""
        place = spread_heads(self.position, x.shape[1])
        if self.pads == (0, 0) and self.first == 0:
            return x
        slots = int(place.max().clamp(min=0)) + 1
        place = place.where(place >= 0, slots).expand(x.shape)  # padding goes to a slot that is cut off
        return x.new_zeros(*x.shape[:-1], slots + 1).scatter_add_(-1, place, x)[..., :slots]

    def take(self, where: slice | Tensor) -> Positions:
        """The places at `where` on the last axis."""
        first = None
        if isinstance(where, slice) and self.first is not None:
            first = self.first + (where.start or 0)
        is_filled = None if self.is_filled is None else self.is_filled[..., where]
        index = self.index[..., where]
        position = index if self.position is self.index else self.position[..., where]
        return Positions(index, position, first, self.pads, is_filled, self.last)


@dataclass(frozen=True, eq=False)
class Pairs:
    """A tile of query-key pairs; every coordinate broadcasts to `[b h r k]`."""

    queries: Positions
    keys: Positions
    heads: int
    rows: slice
    cols: slice | Tensor

    @cached_property
    def q(self) -> Tensor:
        return spread_heads(self.queries.position, self.heads)[..., :, None]

    @cached_property
    def k(self) -> Tensor:
        return spread_heads(self.keys.position, self.heads)[..., None, :]

    @cached_property
    def q_index(self) -> Tensor:
        return spread_heads(self.queries.index, self.heads)[..., :, None]

    @cached_property
    def k_index(self) -> Tensor:
        return spread_heads(self.keys.index, self.heads)[..., None, :]
