"""Where the heads are in what a module hands to torch's attention: `[..., n, d]` to `[b h n d]`, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The leading axes of the queries, and which of them holds the heads; None: the last of them is split into rows."""

    lead: tuple[int, ...]
    axis: int
    split: int | None = None  # the rows of the batch hold this many heads each

    @classmethod
    def of(cls, query: Tensor, told: int | None, rows: int | None) -> Self:
        """What suits the queries of a module that tells its heads, and was handed so many rows."""
        lead = tuple(query.shape[:-2])
        if len(lead) < 2:
            split = told if told and told > 1 and rows and lead == (rows * told,) else None
            return cls(lead, 1, split)
        axis = len(lead) - 1
        if told is not None and lead[axis] != told and told in lead and (len(lead) > 2 or lead == (told, rows)):
            axis = lead.index(told)
        return cls(lead, axis)

    def fold(self, x: Tensor) -> Tensor:
        """`[b h n d]`; what has fewer axes is the same for all of them."""
        if self.split is not None:
            return x.unflatten(0, (-1, self.split)) if x.ndim > 2 and len(x) > 1 else x.reshape(1, 1, *x.shape[-2:])
        if len(self.lead) < 2:
            return x.reshape(-1, 1, *x.shape[-2:])
        x = x[(None,) * (len(self.lead) + 2 - x.ndim)].movedim(self.axis, -3)
        if len(self.lead) == 2:
            return x
        outer = tuple(n for i, n in enumerate(self.lead) if i != self.axis)
        if any(n > 1 for n in x.shape[:-3]):
            x = x.expand(*outer, *x.shape[-3:])
        return x.flatten(0, -4)

    def unfold(self, x: Tensor) -> Tensor:
        """What `fold` made of something of the queries, as it was."""
        if self.split is not None or len(self.lead) < 2:
            return x.reshape(*self.lead, *x.shape[-2:])
        if len(self.lead) == 2:
            return x.movedim(-3, self.axis)
        outer = [n for i, n in enumerate(self.lead) if i != self.axis]
        return x.reshape(*outer, *x.shape[-3:]).movedim(-3, self.axis)


def same_rows(x: Tensor, rows: int) -> Tensor:
    """`[b g k d]` with as many rows as the queries, where all of them share one."""
    return x if x.shape[0] == rows else x.expand(rows, *x.shape[1:])
