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
    grouped: bool = False  # all axes but the first hold heads, in groups that share a key head

    @classmethod
    def of(cls, query: Tensor, told: int | None, stream: Tensor | None) -> Self:
        """What suits the queries of a module that tells its heads, or does not, and was handed this `[b n e]`."""
        lead, (n, d) = tuple(query.shape[:-2]), query.shape[-2:]
        rows, tokens, width = (None, None, None) if stream is None or stream.ndim != 3 else stream.shape
        if stream is not None and stream.ndim > 3:
            rows = len(stream)
        if len(lead) < 2:
            split = told if told and told > 1 and rows and lead == (rows * told,) else None
            if (
                told is None
                and rows
                and width
                and n == tokens
                and lead == (width // d * rows,)
                and _views_of_rows(query)
            ):
                split = lead[0] // rows
            return cls(lead, 1, split if split != 1 else None)
        axis = len(lead) - 1
        if told is not None and lead[axis] != told and told in lead and (len(lead) > 2 or lead == (told, rows)):
            return cls(lead, lead.index(told))
        if told is None and len(lead) == 2 and lead[0] != rows == lead[1] and n == tokens and lead[0] * d == width:
            return cls(lead, 0)
        if len(lead) == 3 and lead[0] == rows and n == tokens and told in (None, lead[1] * lead[2]):
            return cls(lead, 1, grouped=True)
        return cls(lead, axis)

    def fold(self, x: Tensor, keys: bool = False) -> Tensor:
        """`[b h n d]`; what has fewer axes is the same for all of them. Keys may have fewer heads."""
        if self.split is not None:
            return x.unflatten(0, (-1, self.split)) if x.ndim > 2 and len(x) > 1 else x.reshape(1, 1, *x.shape[-2:])
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
            return x.reshape(*self.lead, *x.shape[-2:])
        if len(self.lead) == 2:
            return x.movedim(-3, self.axis)
        outer = [n for i, n in enumerate(self.lead) if i != self.axis]
        return x.reshape(*outer, *x.shape[-3:]).movedim(-3, self.axis)


def _views_of_rows(x: Tensor) -> bool:
    """Whether the heads `[b*h n d]` lie beside one another in each token, as in `x.view(n, b * h, d).transpose(0, 1)`.

    Elsewhere heads may come before texts as well as after them, and nothing tells.
    """
    return len(x) > 1 and x.stride(0) == x.shape[2] and x.stride(1) == x.shape[0] * x.shape[2]


def same_rows(x: Tensor, rows: int) -> Tensor:
    """`[b g k d]` with as many rows as the queries, where all of them share one."""
    return x if x.shape[0] == rows else x.expand(rows, *x.shape[1:])
