"""A rule for keys that a method picks for each query, whatever it goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import pad

from heedful.core.column_ranges import Ranges
from heedful.core.mask import Rule
from heedful.core.positions import Pairs


@dataclass(frozen=True, eq=False)
class Chosen(Rule):
    """Keys that `pick` names for the rows it is asked for, `[b|1, h|1, r, k]`; tiles ask, and no map is held whole."""

    pick: Callable[[slice], Tensor]
    _last: list[tuple[int, int | None, Tensor]] = field(default_factory=list, repr=False)

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
        """What was picked for these rows; a tile asks more than once, and for more rows before it is cut."""
        start, stop = rows.start or 0, rows.stop
        if self._last:
            first, end, picked = self._last[0]
            if first <= start and (end is None or (stop is not None and stop <= end)):
                return picked[..., start - first : None if stop is None else stop - first, :]
        self._last[:] = [(start, stop, self.pick(rows))]
        return self._last[0][2]
