"""Weight moved between whole columns of a pattern: the edit that needs no map.

A method that changes weights column by column marks its function with `@reweights` and names the parts of the pattern's
summary that it decides by. It is asked once a call, and every backend but `sdpa` can do what it answers: no kernel has
to show its weights, and memory stays linear in the number of tokens. Edits that act before it may be asked twice in a
call, so they must not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.core.errors import DefinitionError
from heedful.core.sites import Edit, F, Site, marking
from heedful.core.summary import PARTS, require_parts

REWEIGHT_PARTS = tuple(part for part in PARTS if part != "carried")


@dataclass(frozen=True, eq=False)
class Reweight:
    """Each column's weights are multiplied with its factor; the columns that give way restore each row's sum.

    They do so in proportion to their weights. A row with none of its weight on such columns, or too little of it to
    divide by, stays as it is.
    """

    factor: Tensor  # [b|1, h|1, k]: 0 and above, and at most 1 where `free` is False
    free: Tensor | None = None  # [b|1, h|1, k]: which columns restore the sums; None: all of them

    def __post_init__(self) -> None:
        if self.free is not None and self.free.dtype is not torch.bool:
            raise DefinitionError(f"a Reweight's `free` must be of type bool, not {self.free.dtype}")
        high = torch.inf if self.free is None else torch.where(self.free, torch.inf, 1.0)
        if not bool(((self.factor >= 0) & (self.factor <= high) & self.factor.isfinite()).all()):
            raise DefinitionError(
                "a Reweight's factors must be finite, 0 or above, and at most 1 where `free` is False, for example 0.4"
            )

    def on(self, chosen: list[int], heads: int) -> Reweight:
        """The same in some heads, and nothing in all others."""
        inside = torch.zeros(heads, 1, dtype=torch.bool, device=self.factor.device)
        inside[chosen] = True
        return Reweight(self.factor.where(inside, 1.0), None if self.free is None else self.free | ~inside)

    @property
    def touched(self) -> Tensor:
        """The columns `[c]` that are more to some head than one of many whose sum is restored."""
        moved = self.factor != 1
        if self.free is not None:
            moved = moved | (~self.free & moved.any(-1, keepdim=True))
        return moved.flatten(0, -2).any(0).nonzero().flatten()

    def of(self, weights: Tensor, cols: slice | Tensor) -> Tensor:
        """A tile's weights `[b h r k]` after it, where `cols` are the tile's columns."""
        kept, free, total, aim = self.parts(weights, cols, weights.sum(-1, keepdim=True))
        enough = total >= torch.finfo(total.dtype).tiny
        scale = aim / total.masked_fill(~enough, 1.0)
        restored = kept * scale if free is None else torch.where(free, kept * scale, kept)
        return torch.where(enough, restored, weights)

    def parts(
        self, weights: Tensor, cols: slice | Tensor, whole: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Weights at some columns times their factors, and which of these columns give way, None for all.

        Then what those come to, and what they and all others that give way are to come to in rows whose sums are
        `whole`.
        """
        kept = weights * self.factor[..., cols][..., None, :].to(weights.dtype)
        if self.free is None:
            return kept, None, kept.sum(-1, keepdim=True), whole
        free = self.free[..., cols][..., None, :]
        held = kept.masked_fill(free, 0.0).sum(-1, keepdim=True)
        return kept, free, kept.masked_fill(~free, 0.0).sum(-1, keepdim=True), whole - held


def reweights(*requested: str) -> Callable[[F], F]:
    """Mark a function that takes the `Summary` of the pattern so far, and returns a `Reweight`, or None for none."""
    require_parts("reweights", requested, REWEIGHT_PARTS)
    return marking(Edit(Site.PATTERN, sums=tuple(sorted(set(requested))), reweights=True))
