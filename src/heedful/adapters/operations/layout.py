"""Where the heads are in what a module hands to torch's attention: `[..., n, d]` to `[b h n d]`, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The leading axes of the queries, and which of them holds the heads."""

    lead: tuple[int, ...]
    axis: int  # where the only one is split, of the two that it is split into
    split: int | None = None  # the one axis there is holds this many heads of each row of the batch
    grouped: bool = False  # all axes but the first hold heads, in groups that share a key head
    of_grid: bool = False  # the axis taken for that of heads may be one of the places, as of frames

    @classmethod
    def of(cls, query: Tensor, told: int | None, stream: Tensor | None, at: int | None = None) -> Self:
        """What suits the queries of a module that was handed this `[b n e]`; its heads, and their axis, where known."""
        lead, (n, d), rows = tuple(query.shape[:-2]), query.shape[-2:], rows_in(stream)
        tokens, width = stream.shape[1:] if stream is not None and stream.ndim == 3 else (None, 0)
        if len(lead) < 2:
            heads = width // d if told is None and n == tokens else told
            split = heads if heads and heads > 1 and rows and lead == (rows * heads,) else None
            return cls(lead, 1 if at is None else at, split)
        if len(lead) == 3 and lead[0] == rows and n == tokens and told in (None, lead[1] * lead[2]):
            return cls(lead, 1, grouped=True)
        if at is not None and at < len(lead) and told in (None, lead[at]):
            return cls(lead, at)
        axis = len(lead) - 1
        if told is not None and lead[axis] != told and told in lead and (len(lead) > 2 or lead == (told, rows)):
            axis = lead.index(told)
        return cls(lead, axis, of_grid=len(lead) == 2 and _apart(n, lead, stream))

    def choices(self, told: int | None, rows: int | None) -> tuple[int, ...]:
        """The axes that may hold the heads as far as sizes tell."""
        if self.split is not None:
            return (0, 1)
        if self.grouped:
            return (self.axis,)
        if told is None:  # sizes tell that the rows come first, if anything
            swapped = len(self.lead) == 2 and rows == self.lead[1] and self.lead[0] > 1
            return (0, 1) if swapped else (self.axis,)
        return tuple(i for i, n in enumerate(self.lead) if n == told > 1) or (self.axis,)

    def open(self, told: int | None, rows: int | None) -> bool:
        """Whether several axes may hold the heads."""
        several = len(self.choices(told, rows)) > 1 and (self.split is None or rows != 1)
        return several or self.of_grid or self.shared(told, rows)

    def shared(self, told: int | None, rows: int | None) -> bool:
        """Whether the first of two axes may hold texts and heads together, and the second something else."""
        return len(self.lead) == 2 and told is not None and rows is not None and self.lead[0] == rows * told > rows

    def told_by(self, changed: Tensor, told: int | None, rows: int | None) -> int | None:
        """The axis of the heads, where one token of one row was changed and so were these queries `[.. n]`.

        A token is at one place in all heads, but not in all rows or windows.
        """
        fits = []
        for axis in self.choices(told, rows):
            split = None if self.split is None else (self.split, -1) if axis == 0 else (-1, self.split)
            seen = changed if split is None else changed.unflatten(0, split)
            if self.shared(told, rows) and seen.shape[axis] != told:
                continue
            if bool((seen == seen.narrow(axis, 0, 1)).all()):
                fits.append((seen.shape[axis] == 1, axis))
        several = min(fits)[0] if fits else True
        found = [axis for one, axis in fits if one == several]
        return found[0] if len(found) == 1 and bool(changed.any()) else None

    def fold(self, x: Tensor, keys: bool = False) -> Tensor:
        """`[b h n d]`; what has fewer axes is the same for all of them. Keys may have fewer heads."""
        if self.split is not None:
            if x.ndim < 3 or len(x) == 1:
                return x.reshape(1, 1, *x.shape[-2:])
            return x.unflatten(0, (-1, self.split)) if self.axis else x.unflatten(0, (self.split, -1)).transpose(0, 1)
        if len(self.lead) < 2:
            return x.reshape(-1, 1, *x.shape[-2:])
        x = x[(None,) * (len(self.lead) + 2 - x.ndim)]
        if self.grouped:
            few = x.shape[1:3].numel() == 1 or (keys and x.shape[2] == 1)
            return (x if few else x.expand(-1, *self.lead[1:], -1, -1)).flatten(1, 2)
        x = x.movedim(self.axis, -3)
        if len(self.lead) == 2:
            return x
        outer = tuple(n for i, n in enumerate(self.lead) if i != self.axis)
        if any(n > 1 for n in x.shape[:-3]):
            x = x.expand(*outer, *x.shape[-3:])
        return x.flatten(0, -4)

    def unfold(self, x: Tensor) -> Tensor:
        """What `fold` made of something of the queries, as it was."""
        if self.split is not None or self.grouped or len(self.lead) < 2:
            x = x if self.split is None or self.axis else x.transpose(0, 1)
            return x.reshape(*self.lead, *x.shape[-2:])
        if len(self.lead) == 2:
            return x.movedim(-3, self.axis)
        outer = [n for i, n in enumerate(self.lead) if i != self.axis]
        return x.reshape(*outer, *x.shape[-3:]).movedim(-3, self.axis)


def _apart(n: int, lead: tuple[int, ...], stream: Tensor | None) -> bool:
    """Whether a grid `[b e ..]` or `[b .. e]` has as many places as `n` and what stands before it make together."""
    if stream is None or stream.ndim < 4 or lead[0] != len(stream):
        return False
    places = {stream.shape[2:].numel(), stream.shape[1:-1].numel()}
    return n not in places and n * lead[1] in places


def rows_in(stream: Tensor | None) -> int | None:
    """The rows of what a module is handed, where it has some."""
    return len(stream) if stream is not None and stream.ndim > 2 else None


def same_rows(x: Tensor, rows: int) -> Tensor:
    """`[b g k d]` with as many rows as the queries, where all of them share one."""
    return x if x.shape[0] == rows else x.expand(rows, *x.shape[1:])
