"""A rule for keys that a method picks for each query, whatever it goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.core.column_ranges import Ranges
from heedful.core.mask import Rule
from heedful.core.positions import Pairs

GRAIN = 16  # columns that are fetched together or not at all


@dataclass(frozen=True, eq=False)
class Chosen(Rule):
    """Keys that `pick` names for the rows it is asked for, `[b|1, h|1, r, k]`; tiles ask, and no map is held whole."""

    pick: Callable[[slice], Tensor]
    _last: list[tuple[slice, Tensor]] = field(default_factory=list, repr=False)

    def keeps(self, pairs: Pairs) -> Tensor:
        return self._of(pairs.rows)[..., pairs.cols]

    @property
    def scattered(self) -> bool:
        return True

    def columns(self, rows: slice) -> Ranges:
        seen = self._of(rows).flatten(0, -2).any(0)
        total = len(seen)
        seen = torch.nn.functional.pad(seen, (0, -total % GRAIN)).view(-1, GRAIN).any(-1)
        ends = torch.nn.functional.pad(seen, (1, 1)).long().diff().nonzero().flatten() * GRAIN
        return tuple((lo, min(hi, total)) for lo, hi in ends.view(-1, 2).tolist())

    def _of(self, rows: slice) -> Tensor:
        """What was picked for these rows; a tile asks more than once."""
        if not self._last or self._last[0][0] != rows:
            self._last[:] = [(rows, self.pick(rows))]
        return self._last[0][1]
