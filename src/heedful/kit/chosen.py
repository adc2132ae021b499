"""A rule for keys that a method picks for each query, whatever it goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.column_ranges import Ranges
from heedful.core.mask import Rule
from heedful.core.positions import Pairs

TOGETHER = 256  # rows that are picked at once, whichever of them a tile is about, there and on the way back


@dataclass(frozen=True, eq=False)
class Chosen(Rule):
    """Keys that `pick` names for the rows it is asked for, `[b|1, h|1, r, k]`; tiles ask, and no map is held whole."""

    pick: Callable[[slice], Tensor]  # asked for rows beyond the last, it leaves them out
    _last: list[tuple[slice, Tensor]] = field(default_factory=list, repr=False)  # a tile lies in two blocks of rows

    def keeps(self, pairs: Pairs) -> Tensor:
        return self._of(pairs.rows)[..., pairs.cols]

    @property
    def scattered(self) -> bool:
        return True

    def columns(self, rows: slice) -> Ranges:
        seen = self._of(rows).flatten(0, -2).any(0)
        ends = pad(seen, (1, 1)).long().diff().nonzero().flatten()
        return tuple((lo, hi) for lo, hi in ends.view(-1, 2).tolist())

    def _of(self, rows: slice) -> Tensor:
        """What was picked for these rows, which are asked for more than once: before a tile is cut, and in it."""
        start, stop = rows.start or 0, rows.stop
        if stop is None:
            return self._picked(slice(None))[..., start:, :]
        parts = []
        for first in range(start - start % TOGETHER, max(stop, start + 1), TOGETHER):
            block = self._picked(slice(first, first + TOGETHER))
            parts.append(block[..., max(start - first, 0) : stop - first, :])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _picked(self, block: slice) -> Tensor:
        for kept, picked in self._last:
            if kept == block:
                return picked
        picked = self.pick(block)
        self._last[:] = [*self._last[-1:], (block, picked)]
        return picked
