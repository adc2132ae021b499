"""Named parts of what a model reads: spans of positions, which may lie on a grid, as the patches of an image do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, pairwise, repeat
from math import prod
from operator import index
from typing import Any, Self

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
        self = super().__new__(cls, ((index(start), index(stop)) for start, stop in spans))
        self.grid = grid
        if grid is not None and prod(grid) != self.tokens:
            rule = f"must hold the {self.tokens} positions of the spans {tuple(self)}, and holds {prod(grid)}"
            raise FieldError("Region", "grid", grid, rule, (1, self.tokens))
        return self

    @property
    def tokens(self) -> int:
        """How many positions there are in the spans."""
        return sum(stop - start for start, stop in self)

    def __repr__(self) -> str:
        return f"Region({tuple(self)}" + (f", grid={self.grid})" if self.grid else ")")


class PerText(tuple[Region, ...]):
    """A region for each text of a batch."""

    def of(self, batch: int | None) -> tuple[Region, ...]:
        """One for each row; a text that beams or several answers repeat stands in as many rows, one after another."""
        rows = len(self) if batch is None else batch
        if rows % len(self):
            rule = f"names spans for {len(self)} texts, and the batch has {rows}"
            raise FieldError("attach()", "roles", len(self), rule, f"a list of {rows} mappings, or one for all")
        return tuple(chain.from_iterable(repeat(region, rows // len(self)) for region in self))


Roles = Mapping[str, Sequence[Span]]  # spans by name, the same in every text
Marks = Mapping[str, Sequence[Span] | PerText]  # these as a call has them


def marks(roles: Roles | Sequence[Roles] | None) -> dict[str, Region | PerText]:
    """Roles as they were given: a mapping that holds for every text, or a list of one for each."""
    if roles is None:
        return {}
    if isinstance(roles, Mapping):
        return {_name(name): _region(name, spans) for name, spans in roles.items()}
    if not isinstance(roles, Sequence) or not roles or not all(isinstance(one, Mapping) for one in roles):
        rule = "must be a mapping of names to spans, or a list with one for each text"
        raise FieldError("attach()", "roles", roles, rule, GOOD)
    each = [marks(one) for one in roles]
    names = dict.fromkeys(chain.from_iterable(each))
    return {name: PerText(one.get(name, Region(())) for one in each) for name in names}  # type: ignore[misc]


GOOD = {"marked": ((4, 9),)}


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise FieldError("attach()", "roles", name, "the name of spans must be a word", GOOD)
    return name


def _region(name: str, spans: Any) -> Region | PerText:
    if isinstance(spans, Region | PerText):
        return spans
    try:
        found = Region(spans)
    except (TypeError, ValueError) as error:
        rule = "must be spans of token positions, each its start and its stop"
        raise FieldError("attach()", "roles", {name: spans}, rule, GOOD) from error
    for start, stop in found:
        if not 0 <= start < stop:
            rule = "a span is a start from 0 on and a stop behind it"
            raise FieldError("attach()", "roles", {name: (start, stop)}, rule, GOOD)
    return found


def by_text(find: Callable[[Region, Tensor], Tensor], regions: tuple[Region, ...], position: Tensor) -> Tensor:
    """What is found at the positions `[b|1 ...]` of each text by its own region, or by the one that all share."""
    if len(regions) == 1:
        return find(regions[0], position)
    rows = position.expand(len(regions), *position.shape[1:])
    return torch.stack([find(region, row) for region, row in zip(regions, rows, strict=True)])


def bounds(regions: tuple[Region, ...]) -> Tensor:
    """The spans as starts and stops, `[b|1 spans 2]`; every text has as many."""
    if len({len(region) for region in regions}) > 1:
        counts = [len(region) for region in regions]
        rule = "must have as many spans in each text"
        raise FieldError("attach()", "roles", counts, rule, [max(counts)] * len(counts))
    return torch.tensor([list(region) for region in regions], dtype=torch.long).view(len(regions), -1, 2)


def marked(spans: Iterable[Span], position: Tensor) -> Tensor:
    """Which positions lie in one of the spans."""
    ordered = sorted(spans)
    if not ordered:
        return torch.zeros_like(position, dtype=torch.bool)
    starts, stops = torch.tensor(ordered, device=position.device).T.contiguous()
    # of the spans that begin at the position or before it
    last = torch.bucketize(position.contiguous(), starts, right=True) - 1
    return (last >= 0) & (position < stops.cummax(0).values[last.clamp(min=0)])


def span_of(spans: Region, position: Tensor) -> Tensor:
    """Which span each position lies in, counted from 0; -1 where in none."""
    if any(one[1] > other[0] for one, other in pairwise(sorted(spans))):
        rule = "must not overlap: a token is of one span or of none"
        raise FieldError("attach()", "roles", tuple(spans), rule, ((0, 4), (4, 9)))
    number = torch.full_like(position, -1)
    for i, (start, stop) in enumerate(spans):
        number = number.masked_fill((position >= start) & (position < stop), i)
    return number


def numbers(region: Region, position: Tensor) -> Tensor:
    """Which of the region's positions, in their order, each one is, from 0 up, and -1 for what lies outside of it."""
    number, before = torch.full_like(position, -1), 0
    for start, stop in region:
        inside = (position >= start) & (position < stop)
        number = torch.where(inside, position - start + before, number)
        before += stop - start
    return number


def coordinates(region: Region, position: Tensor) -> Tensor:
    """Each position's place on the region's grid `[... dims]`, and -1 for what lies outside of it."""
    if region.grid is None:
        raise FieldError("Region", "grid", None, "has no grid, so there are no coordinates", (7, 7))
    number, along = numbers(region, position), []
    for side in reversed(region.grid):
        along.append(number % side)
        number = number.div(side, rounding_mode="floor")
    return torch.stack(along[::-1], -1).masked_fill((number < 0)[..., None], -1)
