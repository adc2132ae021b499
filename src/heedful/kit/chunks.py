"""A text in chunks side by side: which keys the tokens of one see."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from heedful.core.column_ranges import Ranges
from heedful.core.key_ranges import single
from heedful.core.mask import Rule
from heedful.core.positions import Pairs, Positions


@dataclass(frozen=True)
class Chunk(Rule):
    """All keys of the query's chunk of `size` tokens, so many `before` it, and so many `after`."""

    size: int
    before: int | None = 0  # None: all that there are
    after: int = 0

    def keeps(self, pairs: Pairs) -> Tensor:
        start = pairs.q // self.size * self.size
        near = pairs.k < start + self.size + self.after
        return near if self.before is None else near & (pairs.k >= start - self.before)

    def span(self, q: Positions, k: Positions) -> Ranges | None:
        if q.first is None or k.first is None or q.pads is None:
            return None
        first, last = q.first - k.first, q.first + len(q) - 1 - k.first
        start = 0 if self.before is None else max(0, first - self.size + 1 - self.before)
        return ((start, min(len(k), last + self.size + self.after)),)

    def key_ranges(self, q: Positions, k: Positions) -> Tensor | None:
        if k.pads is None:
            return None
        start = q.position // self.size * self.size - k.position[..., :1]
        stop = (start + self.size + self.after).clamp(max=len(k))
        return single(0 if self.before is None else start - self.before, stop)
