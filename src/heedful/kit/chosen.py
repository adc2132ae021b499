"""Rules for keys that a method picks for each query, whatever it goes by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.column_ranges import GATHER_BELOW, Ranges
from heedful.core.flags import both, some
from heedful.core.key_ranges import encode, tidy
from heedful.core.mask import Rule
from heedful.core.positions import Pairs, Positions
from heedful.core.rules import Parts, known
from heedful.kit.topk import places_of

SPARSE = 0.5  # of a call's pairs that parts may have and be worth gathering
TOGETHER = 256  # rows that are picked at once, whichever of them a tile is about, there and on the way back
ROWS = 256  # queries of one part that see the same block of keys
GROUPS_TOGETHER = 2048  # the same where groups of keys are picked, which are few


@dataclass(frozen=True, eq=False)
class _Picked(Rule):
    """What was told of the rows last asked for is kept: tiles ask before they are cut, and after."""

    gather: Callable[[], tuple[Parts, ...]] | None = field(default=None, kw_only=True)  # its pairs, see `Rule.parts`
    _told: list[tuple[slice, Ranges]] = field(default_factory=list, init=False, repr=False)

    @abstractmethod
    def _reached(self, rows: slice) -> Tensor:
        """The columns that some of these rows may see, `[k]`."""

    @property
    def scattered(self) -> bool:
        return True

    def parts(self) -> tuple[Parts, ...]:
        return self._gathered

    @cached_property
    def _gathered(self) -> tuple[Parts, ...]:  # more than one backend asks
        return () if self.gather is None else self.gather()

    def columns(self, rows: slice) -> Ranges:
        if not self._told or self._told[0][0] != rows:
            reached = self._reached(rows)
            ends = pad(reached, (1, 1)).long().diff().nonzero().flatten()
            if len(ends) > 2 and int(reached.sum()) > GATHER_BELOW * int(ends[-1] - ends[0]):
                ends = ends[[0, -1]]  # hundreds of ranges that nobody would copy together
            self._told[:] = [(rows, tuple((lo, hi) for lo, hi in ends.view(-1, 2).tolist()))]
        return self._told[0][1]


@dataclass(frozen=True, eq=False)
class Reached(_Picked):
    """Keys that `pick` names for the rows and columns it is asked for, among those that `reach` says rows may see."""

    pick: Callable[[slice, slice | Tensor], Tensor]  # [b|1, h|1, r, k]
    reach: Callable[[slice], Tensor]  # [k], told without looking at pairs: where it is False, none of the rows sees any

    def keeps(self, pairs: Pairs) -> Tensor:
        return self.pick(pairs.rows, pairs.cols)

    def _reached(self, rows: slice) -> Tensor:
        return self.reach(rows)


@dataclass(frozen=True, eq=False)
class Shown(_Picked):
    """Some keys for all queries, `[b|1, h|1, k]`."""

    shown: Tensor

    def keeps(self, pairs: Pairs) -> Tensor:
        return self.shown[:, :, None, pairs.cols]

    @cached_property
    def _stretches(self) -> Tensor | None:
        return encode(lambda start, stop: self.shown[:, :, None], 1)

    @property
    def scattered(self) -> bool:
        return self._stretches is None

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        return None if self._stretches is None else self._stretches.expand(-1, -1, len(q), -1, -1)

    def _reached(self, rows: slice) -> Tensor:
        return self.shown.flatten(0, 1).any(0)


@dataclass(frozen=True, eq=False)
class Chosen(_Picked):
    """Keys that `pick` names for the rows it is asked for, `[b|1, h|1, r, k]`; tiles ask, and no map is held whole.

    Where it names groups of keys, `laid` says for some columns what was picked of theirs, and `stretches`, where keys
    of a group follow one another, which ranges of columns these are: then a kernel need look at no pair.
    """

    pick: Callable[[slice], Tensor]  # asked for rows beyond the last, it leaves them out
    laid: Callable[[Tensor, slice | Tensor], Tensor] | None = None  # [b|1, h|1, r, groups] to [b|1, h|1, r, k]
    stretches: Callable[[Tensor], Tensor] | None = None  # [b|1, h|1, r, groups] to [b|1, h|1, r, n, 2]
    _last: list[tuple[slice, Tensor]] = field(default_factory=list, repr=False)  # a tile lies in two blocks of rows

    @property
    def scattered(self) -> bool:
        return self.stretches is None

    @property
    def _together(self) -> int:
        return TOGETHER if self.stretches is None else GROUPS_TOGETHER

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        if self.stretches is None:
            return None
        blocks = (slice(start, start + self._together) for start in range(0, len(q), self._together))
        return tidy(torch.cat([self.stretches(self.pick(rows)) for rows in blocks], 2))

    def keeps(self, pairs: Pairs) -> Tensor:
        picked = self._of(pairs.rows)
        return picked[..., pairs.cols] if self.laid is None else self.laid(picked, pairs.cols)

    def _reached(self, rows: slice) -> Tensor:
        picked = self._of(rows)
        if self.laid is not None:
            picked = self.laid(some(picked, 2)[:, :, None], slice(None))
        return some(picked.flatten(0, -2), 0)

    def _of(self, rows: slice) -> Tensor:
        """What was picked for these rows, which are asked for more than once: before a tile is cut, and in it."""
        start, stop = rows.start or 0, rows.stop
        if stop is None:
            return self._picked(slice(None))[..., start:, :]
        parts = []
        together = self._together
        for first in range(start - start % together, max(stop, start + 1), together):
            block = self._picked(slice(first, first + together))
            parts.append(block[..., max(start - first, 0) : stop - first, :])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _picked(self, block: slice) -> Tensor:
        for kept, picked in self._last:
            if kept == block:
                return picked
        picked = self.pick(block)
        self._last[:] = [*self._last[-1:], (block, picked)]
        return picked


Alone = Callable[[Tensor, Tensor, slice], Tensor]


def meeting(asking: Tensor, giving: Tensor, alone: Alone | None = None) -> tuple[Parts, ...]:
    """Parts of queries `asking [b|1 h|1 parts q]` and keys `giving [b|1 h|1 parts k]`, all of which see one another.

    Where queries are in several of them `alone` says which pairs of the queries and keys of some parts, `[b|1 h|1 those
    r|k]`, are of this part and of none before it.
    """
    (rows, asked), (cols, held) = places_of(asking), places_of(giving)
    if rows.shape[2] * rows.shape[3] * cols.shape[3] > SPARSE * asking.shape[3] * giving.shape[3]:
        return ()
    full = bool(held.all())

    def keep(those: slice) -> Tensor:
        there = held[:, :, those, None].expand(-1, -1, -1, rows.shape[3], -1)
        if alone is None:
            return there
        own = alone(rows[:, :, those], cols[:, :, those], those)
        return own if full else both(there, own)

    asked = rows.where(asked, asking.shape[3])
    return (Parts(asked, cols, None if full and alone is None else keep, shared=alone is not None),)


def by_block(chosen: Tensor, size: int) -> tuple[Parts, ...]:
    """Parts of a whole text whose queries see their own block of `size` keys so far, and chosen blocks of the past.

    Which ones is told by `chosen [b|1 h|1 q blocks]`. Queries of one past block lie together, `ROWS` of them a part.
    """
    texts, heads, n, blocks = chosen.shape
    token, block, inside = (torch.arange(x, device=chosen.device) for x in (n, blocks, size))
    past = chosen & (block < (token // size)[:, None])
    line, query = past.mT.reshape(-1, n).nonzero(as_tuple=True)  # a line is a block, of one head and text
    count = line.bincount(minlength=texts * heads * blocks)
    many = -(-count // ROWS)  # parts of each line
    ends = many.view(texts, heads, blocks).cumsum(-1)  # of a head, before the next block
    total = int(ends[..., -1].max())
    if (n + total * ROWS) * size > SPARSE * n * n / 2:
        return ()
    part = torch.arange(total, device=chosen.device)
    first = ends.flatten() - many + torch.arange(texts * heads, device=part.device).repeat_interleave(blocks) * total
    place = torch.arange(len(line), device=part.device) - (count.cumsum(0) - count)[line]  # among those of its line
    rows = query.new_full((texts * heads * total, ROWS), n)
    rows[first[line] + place // ROWS, place % ROWS] = query
    number = torch.searchsorted(ends, part.expand(texts, heads, -1).contiguous(), right=True).clamp(max=blocks - 1)
    cols = (number[..., None] * size + inside).clamp(max=n - 1)
    earlier = Parts(rows.view(texts, heads, total, ROWS), cols, shared=True, past=True)
    own = block[:, None] * size + inside
    keep = known((inside[:, None] >= inside).expand(1, 1, blocks, -1, -1))
    mine = Parts(own.clamp(max=n)[None, None], own.clamp(max=n - 1)[None, None], keep, shared=True, past=True)
    return (mine, earlier) if total else (mine,)
