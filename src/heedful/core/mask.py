"""Which query-key pairs are computed: rules over places, never an N x N tensor unless somebody hands one in.

A `Mask` is the intersection of its rules. A method narrows it with the rules' own algebra:

    mask & (Window(256) | First(4))        # the last 256 keys, and always the first 4

Rules see *positions* (a token's number in its text; left padding does not count) and *indices* (its number in the
padded row). Only the adapters' rules look at indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from heedful.core import key_ranges as ranges
from heedful.core.column_ranges import Ranges, intersection, union
from heedful.core.errors import FieldError
from heedful.core.positions import Pairs, Positions, spread_heads
from heedful.core.rules import Both, Either, OnHeads, Rule

__all__ = [
    "Ahead", "Blocks", "Both", "Causal", "Dense", "Either", "First", "FirstQueries", "Mask", "OnHeads", "Padding",
    "Rule", "Where", "Window",
]  # fmt: skip


def _first(k: Positions) -> Tensor:
    """The index of the first column, `[1 1 1]`."""
    return k.index[:1, :1, :1]


def _pad(k: Positions) -> Tensor:
    """How far positions lag behind indices, `[b|1, g|1, 1]`."""
    return (k.index - k.position)[..., :1]


def _held(k: Positions, heads: int, queries: int) -> Tensor:
    """The range of columns that hold a key."""
    if k.filled is None:
        return torch.tensor([0, len(k)], device=k.index.device).expand(1, 1, queries, 1, 2)
    lost = len(k) - spread_heads(k.filled, heads)
    return torch.stack([lost, torch.full_like(lost, len(k))], -1)[:, :, None, None].expand(-1, -1, queries, -1, -1)


@dataclass(frozen=True)
class Causal(Rule):
    """No key after its query."""

    def keeps(self, pairs: Pairs) -> Tensor:
        q, k = pairs.queries, pairs.keys
        if q.first is None or k.first is None:
            return pairs.k_index <= pairs.q_index
        everything = torch.ones(1, 1, len(q), len(k), dtype=torch.bool, device=q.index.device)
        return everything.tril_(q.first - k.first)  # several times faster than comparing indices

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        if q.first is None or k.first is None:
            return None
        return ((0, q.first + len(q) - k.first),)

    def idle(self, q: Positions, k: Positions) -> bool:
        return q.first is not None and k.last is not None and k.last <= q.first

    def key_ranges(self, q: Positions, k: Positions) -> Tensor:
        return ranges.single(0, (q.index - _first(k) + 1).clamp(max=len(k)))


@dataclass(frozen=True)
class Window(Rule):
    """The query's own key and the `size - 1` before it, and every key after it."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FieldError(self, "size", self.size, "must be 1 or more keys", 256)

    def keeps(self, pairs: Pairs) -> Tensor:
        return pairs.q - pairs.k < self.size

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        if q.first is None or k.first is None or q.pads is None:
            return None
        return ((max(0, q.first - self.size + 1 - k.first), len(k)),)

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        if k.pads is None:
            return None
        lo = q.position - self.size + 1 + _pad(k) - _first(k)
        return ranges.single(lo, torch.full_like(lo, len(k)))


@dataclass(frozen=True)
class Ahead(Rule):
    """The query's own key and the `size - 1` after it, and every key before it: what `Window` is, to the other side."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FieldError(self, "size", self.size, "must be 1 or more keys", 256)

    def keeps(self, pairs: Pairs) -> Tensor:
        return pairs.k - pairs.q < self.size

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        if q.first is None or k.first is None or q.pads is None:
            return None
        return ((0, min(len(k), q.first + len(q) + self.size - 1 - k.first)),)

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        if k.pads is None:
            return None
        return ranges.single(0, (q.position + self.size + _pad(k) - _first(k)).clamp(max=len(k)))


@dataclass(frozen=True)
class FirstQueries(Rule):
    """Every key, for the first `count` tokens of the text; none for the others."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise FieldError(self, "count", self.count, "must be 0 or more queries", 4)

    def keeps(self, pairs: Pairs) -> Tensor:
        return pairs.q < self.count

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        if q.first is None or q.pads is None:
            return None
        return ((0, len(k)),) if q.first - q.pads[1] < self.count else ()

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        return ranges.single(0, torch.where(q.position < self.count, len(k), 0))


@dataclass(frozen=True)
class First(Rule):
    """The first `count` tokens of the text."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise FieldError(self, "count", self.count, "must be 0 or more keys", 4)

    def keeps(self, pairs: Pairs) -> Tensor:
        return pairs.k < self.count

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        if k.first is None or k.pads is None:
            return None
        return ((0, self.count + k.pads[1] - k.first),)

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        if k.pads is None:
            return None
        hi = (self.count + _pad(k) - _first(k)).clamp(max=len(k))
        return ranges.single(0, hi.expand(*hi.shape[:2], len(q)))


@dataclass(frozen=True)
class Where(Rule):
    """Any condition on the positions of queries `[b h r 1]` and keys `[b h 1 k]`."""

    condition: Callable[[Tensor, Tensor], Tensor]

    def keeps(self, pairs: Pairs) -> Tensor:
        return self.condition(pairs.q, pairs.k)


@dataclass(frozen=True, eq=False)
class Padding(Rule):
    """Which tokens of each row are text: `[b, n]` by index; what lies beyond n is not."""

    text: Tensor

    def keeps(self, pairs: Pairs) -> Tensor:
        return self.at(pairs.k_index[:, :, 0])[..., None, :]

    def at(self, index: Tensor) -> Tensor:
        """Which of these indices `[b|1, h|1, k]` are text, `[b, h|1, k]`."""
        index = index.expand(len(self.text), *index.shape[1:])
        inside = index < self.text.shape[1]
        known = self.text[:, None].expand(-1, index.shape[1], -1)
        return known.gather(-1, index.clamp(max=self.text.shape[1] - 1)) & inside

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        text = self.text[:, int(_first(k)) : int(_first(k)) + len(k)]
        count = text.sum(-1)
        lo = text.long().argmax(-1)
        ends = (text.long().cumsum(-1) == count[:, None]).long().argmax(-1) + 1
        if bool(((ends - lo != count) & (count > 0)).any()):
            return None
        hi = torch.where(count > 0, ends, 0)
        return ranges.single(*(x[:, None, None].expand(-1, 1, len(q)) for x in (lo, hi)))


@dataclass(frozen=True, eq=False)
class Dense(Rule):
    """An explicit table `[b|1, h|1, q|1, k]`, True where the pair is computed."""

    table: Tensor
    apart: bool = False  # its keys lie apart, so that no kernel looks for ranges of them

    @property
    def scattered(self) -> bool:
        return self.apart

    def keeps(self, pairs: Pairs) -> Tensor:
        rows = pairs.rows if self.table.shape[-2] != 1 else slice(None)
        return self.table[..., rows, :][..., pairs.cols]


@dataclass(frozen=True, eq=False)
class Blocks(Rule):
    """A table of blocks `[b|1, h|g|1, q/size, k/size]`, True where the block is computed."""

    table: Tensor
    size: int
    first: Tensor | None = None  # [b, 2]: the row and the column where each text's blocks begin; None: at 0 and 0

    def keeps(self, pairs: Pairs) -> Tensor:
        table = spread_heads(self.table, pairs.heads)
        rows, cols = (self._numbers(axis, where) for axis, where in ((0, pairs.rows), (1, pairs.cols)))
        if self.first is None:
            return table[..., rows[0], :][..., cols[0]]
        table = table.expand(len(self.first), -1, -1, -1)
        texts, heads = (torch.arange(x, device=table.device) for x in table.shape[:2])
        return table[texts[:, None, None, None], heads[:, None, None], rows[:, None, :, None], cols[:, None, None, :]]

    def _numbers(self, axis: int, where: slice | Tensor) -> Tensor:
        """The block of each row (column), `[b|1, r]`; what stands before a text counts to its first block."""
        first = self.table.new_zeros(1, 2, dtype=torch.long) if self.first is None else self.first
        total = self.table.shape[2 + axis] * self.size + int(first[:, axis].max())
        index = torch.arange(total, device=self.table.device)[where]
        return (index - first[:, axis, None]).clamp(min=0) // self.size

    def columns(self, rows: slice) -> Ranges:
        """The columns that some query of `rows` computes."""
        first = [[0, 0]] if self.first is None else self.first.tolist()
        out: Ranges = ()
        for table, (row, col) in zip(
            self.table[None] if self.first is None else self.table.expand(len(first), -1, -1, -1), first, strict=True
        ):
            start, stop = (max(x - row, least) for x, least in ((rows.start, 0), (rows.stop, 1)))
            blocks = table[..., start // self.size : (stop - 1) // self.size + 1, :]
            seen = blocks.flatten(0, -2).any(0).nonzero().flatten().tolist()
            reached = tuple((i * self.size + col if i else 0, (i + 1) * self.size + col) for i in seen)
            out = union(out, reached)
        return out

    def on(self, heads: tuple[int, ...], total: int) -> Rule:
        table = spread_heads(self.table, total).expand(-1, total, -1, -1).clone()
        table[:, [i for i in range(total) if i not in heads]] = True
        return Blocks(table, self.size, self.first)

    def joined(self, other: Blocks) -> Blocks | None:
        """The table of the blocks that both compute; None where their blocks begin at other places."""
        if (self.first is None) != (other.first is None):
            return None
        if self.first is not None and other.first is not None and not torch.equal(self.first, other.first):
            return None
        size = math.gcd(self.size, other.size)
        units = max(self.table.shape[1], other.table.shape[1])
        a, b = (
            spread_heads(x.table, units).repeat_interleave(x.size // size, -2).repeat_interleave(x.size // size, -1)
            for x in (self, other)
        )
        rows, cols = (min(a.shape[i], b.shape[i]) for i in (-2, -1))
        return Blocks(a[..., :rows, :cols] & b[..., :rows, :cols], size, self.first)


@dataclass(frozen=True, eq=False)
class Mask:
    """The pairs that every rule keeps; without rules, all pairs."""

    rules: tuple[Rule, ...] = field(default=())
    _last: list[tuple[Positions, Positions, Tensor | None]] = field(default_factory=list, repr=False)

    def __and__(self, rule: Rule) -> Mask:
        return Mask((*self.rules, rule))

    def keeps(self, pairs: Pairs) -> Tensor | None:
        """True where the pair is computed, `[b|1, h|1, r, k]`; None when all are."""
        kept = [rule.keeps(pairs) for rule in self.acting(pairs.queries, pairs.keys)]
        if pairs.keys.is_filled is not None:
            kept.append(spread_heads(pairs.keys.is_filled, pairs.heads)[..., None, :])
        if not kept:
            return None
        out = kept[0]
        for more in kept[1:]:
            out = out & more
        return out.expand(*out.shape[:-2], len(pairs.queries), len(pairs.keys))

    def columns(self, q: Positions, k: Positions, rows: slice) -> Ranges:
        """The key columns that the queries `q`, rows `rows` of the call, may see."""
        out: Ranges = ((0, len(k)),)
        for rule in self.rules:
            seen = rule.columns(rows)
            seen = rule.span(q, k) if seen is None else seen
            if seen is not None:
                out = intersection(out, seen)
        return out

    def key_ranges(self, q: Positions, k: Positions, heads: int) -> Tensor | None:
        """The ranges of columns that each query of a whole call keeps, whatever `Blocks` say; None where too many.

        The layers of a forward share mask and places, so the last answer is kept.
        """
        if not self._last or self._last[0][0] is not q or self._last[0][1] is not k:
            self._last[:] = [(q, k, self._find_rows(q, k, heads))]
        return self._last[0][2]

    def _find_rows(self, q: Positions, k: Positions, heads: int) -> Tensor | None:
        rules = [rule for rule in self.acting(q, k) if not isinstance(rule, Blocks)]
        if any(rule.scattered for rule in rules):
            return None
        if (k.first is not None or not rules) and (k.is_filled is None or k.filled is not None):
            out: Tensor | None = _held(k, heads, len(q))
            for rule in rules:
                found = rule.key_ranges(q, k)
                out = None if found is None or out is None else ranges.intersection(out, found)
            if out is not None:
                return out if out.shape[-2] <= ranges.MOST else None
        everything = slice(0, len(k))

        def keeps(start: int, stop: int) -> Tensor:
            rows = slice(start, stop)
            part = Pairs(q.take(rows), k, heads, rows, everything)
            kept = Mask(tuple(rules)).keeps(part)
            return (
                torch.ones(1, 1, stop - start, len(k), dtype=torch.bool, device=k.index.device)
                if kept is None
                else kept
            )

        return ranges.encode(keeps, len(q))

    def idle(self, q: Positions, k: Positions) -> bool:
        """Whether every query is known to see every key that there is."""
        return not self.acting(q, k)

    def acting(self, q: Positions, k: Positions) -> list[Rule]:
        """The rules that are not known to keep every pair of these."""
        return [rule for rule in self.rules if not rule.idle(q, k)]

    @cached_property
    def blocks(self) -> tuple[Blocks, ...]:
        """The block tables, joined into one where their blocks begin at the same places."""
        out: list[Blocks] = []
        for rule in self.rules:
            if isinstance(rule, Blocks):
                joined = out[-1].joined(rule) if out else None
                out[-1:] = [joined] if joined else [*out[-1:], rule]
        return tuple(out)

    @cached_property
    def padding(self) -> Padding | None:
        """Which tokens are text, where some are not."""
        return next((rule for rule in self.rules if isinstance(rule, Padding)), None)

    @cached_property
    def causal(self) -> bool:
        """Some rule forbids every key after its query."""
        return any(isinstance(rule, Causal) for rule in self.rules)

    @property
    def only_causal(self) -> bool:
        """Nothing but causality, so that a kernel's causal flag says it all."""
        return bool(self.rules) and all(isinstance(rule, Causal) for rule in self.rules)

    @property
    def plain(self) -> bool:
        """Nothing but causality and padding: what a mechanism without a map can honour."""
        return all(isinstance(rule, Causal | Padding) for rule in self.rules)
