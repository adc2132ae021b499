"""Choosing which blocks of a map are computed: what the methods that skip blocks have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.key_ranges import counts
from heedful.core.mask import Blocks, Mask
from heedful.core.method import Method
from heedful.core.ranges import PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.kit.seen import softmax_over


def cover(weight: Tensor, mass: float) -> Tensor:
    """The fewest entries of the last axis whose sum reaches a share `mass` of the whole."""
    if mass >= 1:
        return torch.ones_like(weight, dtype=torch.bool)
    whole, n = weight.sum(-1, keepdim=True), weight.shape[-1]
    few = (weight > (1 - mass) / n * whole).sum(-1)  # the others add up to less than what may be left
    values, order = weight.topk(max(1, int(few.max())), -1)
    before = values.cumsum(-1) - values
    return torch.zeros_like(weight, dtype=torch.bool).scatter(-1, order, before < mass * whole)


def fold(x: Tensor, size: int, first: Tensor | None) -> Tensor:
    """`[b|1 h n ...]` in blocks `[b|1 h n/size size ...]` that begin at `first [b]`; behind the end stand zeros."""
    n = x.shape[2]
    if first is not None:
        place = torch.arange(n, device=x.device) + first[:, None]
        x = x.expand(len(first), *x.shape[1:]).transpose(1, 2)
        x = x[torch.arange(len(first), device=x.device)[:, None], place.clamp(max=n - 1)]
        x = x.masked_fill((place >= n).view(*place.shape, *[1] * (x.dim() - 2)), 0).transpose(1, 2)
    if n % size:
        x = torch.nn.functional.pad(x, (*(0, 0) * (x.dim() - 3), 0, -n % size))
    return x.unflatten(2, (-1, size))


def hide(scores: Tensor, hidden: Tensor) -> None:
    """Scores of these pairs become the least number, in place; several times faster than filling by a mask."""
    scores.add_(hidden.to(scores.dtype), alpha=torch.finfo(scores.dtype).min)


def means(x: Tensor, is_text: Tensor) -> Tensor:
    """The mean of what lives in each block: `[b h n size d]` and `[b|1 1 n size]` to `[b h n d]`."""
    if bool(is_text.all()):
        return x.mean(-2)  # reads x where it lies; the product would copy it
    weight = is_text.to(x.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1)
    return (weight[..., None, :] @ x)[..., 0, :]


@dataclass(frozen=True, eq=False)
class Grid:
    """The blocks of one call's map. Rows and columns are counted from where each text begins."""

    call: Call
    size: int
    first: Tensor | None  # [b, 2]: the row and column of the call where each text begins; None: at 0 and 0
    start: Tensor  # [b|1]: the column in which the first row's own key stands
    open: Tensor  # [b|1, h|1, n, m]: blocks of which the mask keeps some pair
    rows: Tensor  # [b|1, 1, n, size]: which queries are text
    cols: Tensor  # [b|1, 1, m, size]: which keys some query of the text sees
    ranges: Tensor  # [b|1, h|1, n, size, r, 2]: the columns that each query sees, see `core.key_ranges`

    @staticmethod
    def of(call: Call, size: int) -> Grid | None:
        """None where some query's keys lie in so many stretches that blocks say little about them.

        Layers of one forward that share mask and places share the grid: its geometry is kept in the call's scratch.
        """
        held: Grid | None = call.state.forward.get(f"grid {size}")
        if held is not None and held._fits(call):
            return replace(held, call=call)
        grid = Grid._laid(call, size)
        if grid is not None:
            call.state.forward[f"grid {size}"] = replace(
                grid, call=replace(call, hidden=None, query=None, key=None, value=None)
            )
        return grid

    def _fits(self, call: Call) -> bool:
        own = self.call
        same = own.mask is call.mask and own.queries is call.queries and own.keys is call.keys
        return same and own.heads == call.heads

    @staticmethod
    def _laid(call: Call, size: int) -> Grid | None:
        ranges = call.mask.key_ranges(call.queries, call.keys, call.heads)
        if ranges is None:
            return None
        q, k = call.queries, call.keys
        first = None
        if k.pads is not None and k.pads[1] > 0:
            pad = (k.index - k.position)[:, 0, 0]
            first = torch.stack([(pad - x.index[:, 0, 0]).clamp(min=0) for x in (q, k)], -1)
        begins = torch.zeros(1, 2, dtype=torch.long, device=q.index.device) if first is None else first
        ahead = len(k) - len(q) if q.first is None or k.first is None else q.first - k.first
        top, left = (None, None) if first is None else first.unbind(-1)
        is_text = call.is_text.expand(-1, -1, len(q))
        ranges = ranges.expand(-1, -1, len(q), -1, -1)
        seen = (counts(*_alike(ranges, is_text[..., None]), len(k)) > 0).any(1, keepdim=True)
        ranges = fold((ranges - begins[:, 1].view(-1, 1, 1, 1, 1)).clamp(min=0), size, top)
        rows = fold(is_text, size, top)
        cols = fold(seen, size, left)
        whole = torch.stack([ranges[..., 0] // size, (ranges[..., 1] + size - 1) // size], -1)
        filled = rows[..., None] & (ranges[..., 0] < ranges[..., 1])
        whole, filled = _alike(whole, filled)
        opened = counts(whole.flatten(1, 2), filled.flatten(1, 2), cols.shape[2]) > 0
        return Grid(
            call,
            size,
            first,
            begins[:, 0] + ahead - begins[:, 1],
            opened.unflatten(1, whole.shape[1:3]),
            rows,
            cols,
            ranges,
        )

    @cached_property
    def query(self) -> Tensor:
        """The call's queries in blocks, `[b h n size d]`."""
        return self._folded(self.call.query, 0)

    @cached_property
    def key(self) -> Tensor:
        """The call's keys in blocks, `[b g m size d]`."""
        return self._folded(self.call.key, 1)

    @cached_property
    def grouped(self) -> Tensor:
        """The call's queries in blocks, those of the heads that share a key head above one another `[b g n r d]`."""
        return self.query.unflatten(1, (self.key.shape[1], -1)).transpose(2, 3).flatten(3, 4)

    def apart(self, x: Tensor) -> Tensor:
        """Something of the grouped queries `[b g n r]` by their heads again, `[b h n size]`."""
        return x.unflatten(-1, (-1, self.size)).transpose(2, 3).flatten(1, 2)

    def _folded(self, x: Tensor | None, axis: int) -> Tensor:
        if x is None:
            raise FieldError("Grid", "call", self.call.name, "has no queries and keys before MASK", None)
        x = x.detach() if x.dtype == torch.float64 else x.detach().float()
        return fold(x, self.size, None if self.first is None else self.first[:, axis])

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Queries `[... n d]` times keys `[... k d]`, scaled and soft-capped as the model does."""
        return self.call.capped((self.call.scale * query) @ key.mT)

    def pooled(self, query: Tensor, key: Tensor, among: Tensor | None = None) -> Tensor:
        """The map `[b h n m]` of block means `[b h n d]` and `[b g m d]`: softmax over open blocks, or `among`."""
        scores = self.scores(query, self.call.spread(key))
        return softmax_over(scores, self.open if among is None else among)

    @property
    def length(self) -> Tensor:
        """How many rows of each text this call has, `[b|1]`."""
        return self.rows.sum((1, 2, 3))

    def weights(self, at: Tensor, step: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """The true weights of the rows `at [b|1 r]`, `[b h step m' size]`, a few rows at a time, and those rows.

        They are those of scores without biases and learned sinks. Blocks behind the last that one of them sees are
        left out; rows that are no text weigh nothing.
        """
        query, key, ranges, is_text = (x.flatten(2, 3) for x in (self.query, self.key, self.ranges, self.rows))
        b, h, n, d = query.shape
        texts = torch.arange(b, device=query.device)[:, None]
        for rows in at.expand(b, -1).split(step, -1):
            place = rows.clamp(0, n - 1)
            q, see, text = (x.expand(b, *x.shape[1:]).transpose(1, 2)[texts, place].transpose(1, 2)
                            for x in (query, ranges, is_text))  # fmt: skip
            see = see * (text & (rows == place)[:, None])[..., None, None]
            stop = max(1, -(-int(see.max()) // self.size)) * self.size
            scores = self.scores(q.reshape(b, key.shape[1], -1, d), key[:, :, :stop]).view(b, h, -1, stop)
            low, high = int(see[..., 0, 0].max()), int(see[..., 0, 1].min())  # between them every row sees all
            for part in (slice(0, low), slice(max(low, high), stop)):
                cols = torch.arange(part.start, part.stop, device=q.device)
                hide(scores[..., part], ((cols < see[..., :1]) | (cols >= see[..., 1:])).all(-2))
            weights = scores.softmax(-1)
            empty = (see[..., 0] >= see[..., 1]).all(-1)
            if bool(empty.any()):
                weights = weights.masked_fill(empty[..., None], 0)
            yield weights.unflatten(-1, (-1, self.size)), rows

    def band(self, width: Tensor | int) -> Tensor:
        """Blocks with a key among the `width [b|1]` newest of some row, its own counted, `[b|1, 1, n, m]`."""
        n, m = self.open.shape[-2:]
        row = self.start[:, None, None, None] + self.size * torch.arange(n, device=self.open.device)[:, None]
        col = self.size * torch.arange(m, device=self.open.device)
        width = width.view(-1, 1, 1, 1) if isinstance(width, Tensor) else width
        return (col < row + self.size) & (col + self.size > row - width + 1)

    def narrow(self, mask: Mask, table: Tensor, most: float) -> Mask:
        """The mask with the chosen blocks `[b|1 h|1 n m]` alone; a text that needs more than `most` of them keeps all.

        Each row keeps the block of its own key, so that none is left with nothing.
        """
        table = (table | self.band(1)) & self.open
        dense = (density(table, self.open) > most).view(-1, 1, 1, 1)
        return mask if bool(dense.all()) else mask & Blocks(table | (dense & self.open), self.size, self.first)


def density(table: Tensor, among: Tensor) -> Tensor:
    """The share of blocks that a table `[b|1 h|1 n m]` computes, `[b|1]`."""
    table, among = torch.broadcast_tensors(table, among)
    return (table & among).sum((1, 2, 3)) / among.sum((1, 2, 3)).clamp(min=1)


def _alike(ranges: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges `[..., 2]` and a weight `[...]` for each of them, expanded to one shape."""
    ranges, weight = torch.broadcast_tensors(ranges, weight[..., None])
    return ranges, weight[..., 0]


class BlockSparse(Method, abstract=True):
    """Reads a prompt by some blocks of the map alone; decoding sees all keys."""

    causal = False  # a block of queries is judged as one, by its later rows too
    chunk_invariant = False  # blocks of queries begin with the call, and decoding is left alone
    # tokens along a side of a block of pairs; `native` skips multiples of 32
    block: PositiveInt = field(default=64, kw_only=True)
    # share of blocks above which a text is predicted slower: it stays dense
    most: Share = field(default=0.9, kw_only=True)

    @abstractmethod
    def choose(self, grid: Grid) -> Tensor | None:
        """Which blocks are computed, `[b|1 h|1 n m]`; None: all of them."""

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross or self.most == 0

    @at(Site.MASK)
    def skip(self, mask: Mask, call: Call) -> Mask:
        grid = Grid.of(replace(call, mask=mask), self.block)
        table = None if grid is None else self.choose(grid)
        return mask if grid is None or table is None else grid.narrow(mask, table, self.most)
