"""Squares of a grid, each with the rectangle of patches that its own may see, on a grid of any number of axes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.flags import both, every
from heedful.core.rules import Parts, known

SIDES = range(2, 17)  # of squares that are tried
GATHERED = 60  # pairs that take as long as it does to gather a key
WORTH = 0.5  # of a grid's patches that a patch may cost, to be gathered at all
KEPT = 1 << 24  # pairs of a cut that is kept: a byte each, and a larger one costs little beside its attention

Ends = tuple[tuple[int, int], ...]  # of an axis, the first place that each place sees, and the one behind the last


def squares(query: Tensor, key: Tensor, sides: Sequence[int], meet: Sequence[Tensor]) -> tuple[Parts, ...]:
    """The parts of a mask by axes, from places of queries and keys `[b|1 g|1 n axes]`, behind the ends for none.

    `meet` says which places of an axis see one another, `[n+1 n+1]`. Nothing is gathered where patches are missing,
    stand otherwise in each text, or see most of the grid.
    """
    whole = [table[:n, :n] for table, n in zip(meet, sides, strict=True)]
    if query.shape[:2] != (1, 1) or key.shape[:2] != (1, 1) or not all(bool(x.any(1).all()) for x in whole):
        return ()
    asking = _by_cell(query[0, 0], sides)
    held = asking if key is query else _by_cell(key[0, 0], sides)
    ends = tuple(_ends(table) for table in whole)
    side = _side(ends)
    if asking is None or held is None or side is None:
        return ()
    told = tuple(bytes(table.flatten().tolist()) for table in whole)
    small = prod(sides) * prod(_widths(ends, side)) <= KEPT
    cut = _kept if small else _cut
    rows, cols, keep = cut(told, tuple(sides), side, query.device)
    cells, total = prod(sides), query.shape[2]
    (patches, others), (their_patches, their_others) = asking, held
    rows = torch.cat([patches, patches.new_tensor([total])])[rows.where(rows >= 0, cells)]
    cols = torch.cat([their_patches[cols], their_others.expand(len(cols), -1)], 1)
    if keep is not None and len(their_others):
        keep = pad(keep, (0, len(their_others)), value=True)
    found = (Parts(rows[None, None], cols[None, None], None if keep is None else known(keep[None, None])),)
    if not len(others):
        return found
    everything = torch.arange(key.shape[2], device=key.device)
    return *found, Parts(others[None, None, None], everything[None, None, None])


@torch.inference_mode(False)  # a later call may keep them for its way back
def _cut(
    tables: tuple[bytes, ...], sides: tuple[int, ...], side: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Squares of a grid: their cells `[m r]`, -1 for none, the cells that these see `[m k]`, and which pairs meet."""
    axes = (
        _along(torch.tensor(list(flat), device=device).view(n, n).bool(), side)
        for n, flat in zip(sides, tables, strict=True)
    )
    rows, cols, keep = next(axes)
    for n, (more_rows, more_cols, more) in zip(sides[1:], axes, strict=True):
        rows, cols = _joined(rows, more_rows, n), _joined(cols, more_cols, n)
        keep = both(keep[:, None, :, None, :, None], more[None, :, None, :, None]).flatten(4)
        keep = keep.flatten(2, 3).flatten(0, 1)
    return rows, cols, None if bool(every(keep.flatten(), 0)) else keep


_kept = lru_cache(maxsize=4)(_cut)  # layers and forwards have the same


def _by_cell(places: Tensor, sides: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Which tokens the patches are, row by row, and which are none; None where there is not one for each place."""
    number, cells = torch.zeros_like(places[:, 0]), prod(sides)
    for axis, n in enumerate(sides):
        number = number * n + places[:, axis]
    number = number.where(places[:, 0] < sides[0], cells)
    order = number.argsort()
    patches, others = order[:cells], order[cells:]
    once = torch.equal(number[patches], torch.arange(cells, device=order.device)) and bool(
        (number[others] == cells).all()
    )
    return (patches, others) if once else None


def _ends(table: Tensor) -> Ends:
    """What each place of an axis sees, from a table `[n n]`."""
    first, last = table.int().argmax(1), table.shape[1] - table.flip(1).int().argmax(1)
    return tuple(zip(first.tolist(), last.tolist(), strict=True))


@lru_cache(maxsize=64)
def _side(axes: tuple[Ends, ...]) -> int | None:
    """The side of the squares that cost least a patch; None where that is as much as it costs to see the grid."""
    cost = {}
    for side in SIDES:
        wide = _widths(axes, side)
        places = [-(-len(ends) // side) * min(side, len(ends)) for ends in axes]  # those behind the last ones too
        gathered = prod(w / min(side, len(ends)) for w, ends in zip(wide, axes, strict=True))
        cost[side] = prod(places) / prod(map(len, axes)) * (prod(wide) + GATHERED * gathered)
    best = min(cost, key=cost.__getitem__)
    return best if cost[best] < WORTH * prod(len(ends) for ends in axes) else None


def _widths(axes: tuple[Ends, ...], side: int) -> list[int]:
    """Along each axis, how many places the square that sees most sees."""
    return [max(stop - start for start, stop in _groups(ends, side)) for ends in axes]


def _groups(ends: Ends, side: int) -> list[tuple[int, int]]:
    """What the places of each stretch of an axis see together."""
    parts = (ends[start : start + side] for start in range(0, len(ends), side))
    return [(min(a for a, _ in part), max(b for _, b in part)) for part in parts]


def _along(table: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each stretch of an axis: its places `[m side]`, -1 behind the last, those seen `[m w]`, and who sees which."""
    n, groups = len(table), _groups(_ends(table), side)
    width = max(stop - start for start, stop in groups)
    starts = torch.tensor([min(start, n - width) for start, _ in groups], device=table.device)
    rows = torch.arange(len(groups) * side, device=table.device).view(-1, side)
    cols = starts[:, None] + torch.arange(width, device=table.device)
    keep = table[rows.clamp(max=n - 1)[..., None], cols[:, None]]
    return rows.where(rows < n, -1), cols, keep


def _joined(one: Tensor, other: Tensor, n: int) -> Tensor:
    """Places of a grid `[m x]`, -1 for none, and of one axis more `[l y]`, of length n: `[m l, x y]`."""
    one, other = one[:, None, :, None], other[None, :, None]
    return (one * n + other).where((one >= 0) & (other >= 0), -1).flatten(2).flatten(0, 1)
