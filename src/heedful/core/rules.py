"""What a rule over query-key pairs can be asked, and how rules join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from heedful.core import key_ranges as ranges
from heedful.core.column_ranges import Ranges, intersection, union
from heedful.core.errors import DefinitionError
from heedful.core.flags import between, either
from heedful.core.positions import Pairs, Positions, spread_heads


@dataclass(frozen=True, eq=False)
class Parts:
    """A mask's pairs in parts: some queries, and the keys that some of them see. A query in no part sees nothing."""

    rows: Tensor  # [b|1, h|1, parts, r], which queries of the call; as many as it has: none
    cols: Tensor  # [b|1, h|1, parts, k], which keys
    # which pairs of these parts are computed, [b|1, h|1, parts, r, k], asked of as many as are held at once; None: all
    keep: Callable[[slice], Tensor] | None = None
    shared: bool = False  # a query is in several parts, no two of which compute the same pair
    past: bool = False  # no key that a part computes comes after its query


def known(keep: Tensor) -> Callable[[slice], Tensor]:
    """Pairs of parts `[b|1 h|1 parts r k]`, as `Parts` asks for them, where they are known already."""
    return lambda those: keep[:, :, those]


class Rule:
    """A condition on pairs. Rules join with `&` and `|`.

    It is no abstract class of Python's: every call tells rules apart, and `isinstance` would be a function in Python.
    """

    def keeps(self, pairs: Pairs) -> Tensor:
        """True where the pair is computed, broadcastable to `[b h r k]`."""
        raise DefinitionError(f"{type(self).__name__} does not say which pairs are computed: write its keeps(pairs)")

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        """The key columns outside which no pair of these queries is kept; None when that is not known."""
        return None

    def columns(self, rows: slice) -> Ranges | None:
        """What `span` says, for rules that go by the number of the query's row in the call."""
        return None

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        """The ranges of columns that each query keeps (see `core.key_ranges`); None when they have to be looked for.

        Keys are consecutive when this is asked.
        """
        return None

    @property
    def scattered(self) -> bool:
        """Whether its keys lie apart by nature, so that looking for ranges is in vain."""
        return False

    def parts(self) -> tuple[Parts, ...]:
        """All pairs that it keeps, gathered: several kinds of parts, none of which has a query of another's.

        Empty where nothing would be saved, or that is not known.
        """
        return ()

    def idle(self, q: Positions, k: Positions) -> bool:
        """Whether the rule is known to keep every pair of these."""
        return False

    def on(self, heads: tuple[int, ...], total: int) -> Rule:
        """The same rule for these of `total` query heads; the others keep every pair."""
        return OnHeads(self, heads, total)

    def __or__(self, other: Rule) -> Rule:
        return Either(self, other)

    def __and__(self, other: Rule) -> Rule:
        return Both(self, other)


@dataclass(frozen=True)
class _Join(Rule):
    one: Rule
    other: Rule

    @property
    def scattered(self) -> bool:
        return self.one.scattered or self.other.scattered


@dataclass(frozen=True)
class Either(_Join):
    """Pairs that one rule or the other keeps."""

    def keeps(self, pairs: Pairs) -> Tensor:
        return self.one.keeps(pairs) | self.other.keeps(pairs)

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        a, b = self.one.span(q, k), self.other.span(q, k)
        return None if a is None or b is None else union(a, b)

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        a, b = self.one.key_ranges(q, k), self.other.key_ranges(q, k)
        return None if a is None or b is None else ranges.union(a, b)


@dataclass(frozen=True)
class Both(_Join):
    """Pairs that both rules keep."""

    def keeps(self, pairs: Pairs) -> Tensor:
        return self.one.keeps(pairs) & self.other.keeps(pairs)

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        a, b = self.one.span(q, k), self.other.span(q, k)
        if a is None or b is None:
            return b if a is None else a
        return intersection(a, b)

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        a, b = self.one.key_ranges(q, k), self.other.key_ranges(q, k)
        return None if a is None or b is None else ranges.intersection(a, b)


@dataclass(frozen=True, eq=False)
class OnHeads(Rule):
    """A rule for some heads; the others keep every pair."""

    rule: Rule
    heads: tuple[int, ...]
    total: int  # query heads in all

    def keeps(self, pairs: Pairs) -> Tensor:
        chosen = torch.zeros(pairs.heads, dtype=torch.bool, device=pairs.queries.index.device)
        chosen[list(self.heads)] = True
        return self.rule.keeps(pairs) | ~chosen[None, :, None, None]

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        found = self.rule.key_ranges(q, k)
        if found is None:
            return None
        found = spread_heads(found, self.total).expand(-1, self.total, -1, -1, -1).clone()
        rest = [i for i in range(self.total) if i not in self.heads]
        found[:, rest] = 0
        found[:, rest, :, 0, 1] = len(k)
        return found

    @property
    def scattered(self) -> bool:
        return self.rule.scattered


@dataclass(frozen=True, eq=False)
class Ranged(Rule):
    """Ranges of columns that are told for each query of the whole call, `[b|1, h|1, q, n, 2]`."""

    ranges: Tensor

    def keeps(self, pairs: Pairs) -> Tensor:
        columns = pairs.cols
        if isinstance(columns, slice):
            start = columns.start or 0
            columns = torch.arange(start, start + len(pairs.keys), device=self.ranges.device)
        return self._holds(columns, pairs.rows)

    def _holds(self, places: Tensor, rows: slice) -> Tensor:
        """Which of these places, broadcastable to `[b h r k]`, lie in a range of their row."""
        ranges = self.ranges[:, :, rows, None]
        return reduce(either, (between(places, x[..., 0], x[..., 1]) for x in ranges.unbind(-2)))

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        return self.ranges


@dataclass(frozen=True, eq=False)
class Arranged(Ranged):
    """Ranges of places, once tokens that see one another are put into an order of each head's own.

    A kernel that is handed queries, keys and values in that order has nothing to leave out one by one.
    """

    place: Tensor  # [b|1, h|1, n], where each token comes, of the type of `ranges`

    def keeps(self, pairs: Pairs) -> Tensor:
        return self._holds(self.place[:, :, None, pairs.cols], pairs.rows)

    @property
    def scattered(self) -> bool:
        return True
