"""Named parts of what a model reads: spans of positions, which may lie on a grid, as the patches of an image do."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Self

import torch
from torch import Tensor

from heedful.core.errors import FieldError

Span = tuple[int, int]


class Region(tuple[Span, ...]):
    """Spans of token positions; with a `grid` the positions in them, in order, fill it row by row.

    A plain tuple of spans will do wherever there is no grid.
    """

    grid: tuple[int, ...] | None

    def __new__(cls, spans: Iterable[Span], grid: tuple[int, ...] | None = None) -> Self:
        self = super().__new__(cls, ((start, stop) for start, stop in spans))
        self.grid = grid
        tokens = sum(stop - start for start, stop in self)
        if grid is not None and prod(grid) != tokens:
            rule = f"must hold the {tokens} positions of the spans {tuple(self)}, and holds {prod(grid)}"
            raise FieldError("Region", "grid", grid, rule, (1, tokens))
        return self

    def __repr__(self) -> str:
        return f"Region({tuple(self)}" + (f", grid={self.grid})" if self.grid else ")")


def marked(spans: Iterable[Span], position: Tensor) -> Tensor:
    """Which positions lie in one of the spans."""
    ordered = sorted(spans)
    if not ordered:
        return torch.zeros_like(position, dtype=torch.bool)
    starts, stops = torch.tensor(ordered, device=position.device).T.contiguous()
    # of the spans that begin at the position or before it
    last = torch.bucketize(position.contiguous(), starts, right=True) - 1
    return (last >= 0) & (position < stops.cummax(0).values[last.clamp(min=0)])


def coordinates(region: Region, position: Tensor) -> Tensor:
    """Each position's place on the region's grid `[... dims]`, and -1 for what lies outside of it."""
    if region.grid is None:
        raise FieldError("Region", "grid", None, "has no grid, so there are no coordinates", (7, 7))
    number, before = torch.full_like(position, -1), 0
    for start, stop in region:
        inside = (position >= start) & (position < stop)
        number = torch.where(inside, position - start + before, number)
        before += stop - start
    at = torch.stack(torch.unravel_index(number.clamp(min=0), region.grid), -1)
    return at.masked_fill((number < 0)[..., None], -1)
