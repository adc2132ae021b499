"""Columns in groups: what each group adds up to, and a softmax over some columns of each by itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.flags import left_out, lowered, zeroed

WASTE = 2  # times as many places as columns a table of groups may have


class Groups(NamedTuple):
    """Which columns `[... r k]` belong together, the same in all rows.

    Where groups are nearly as large as one another they are laid into a table, whose columns a CPU joins and multiplies
    side by side; one that would be mostly empty is not made, and numbers are scattered instead.
    """

    number: Tensor  # each column's group, from 0 up, `[... 1 k]`
    many: int
    laid: tuple[Tensor, Tensor] | None  # the table: the columns of all groups, their first ones, their second, ..., and
    # k where there is none; and where in it each column stands, `[... 1 k]`

    @staticmethod
    def of(number: Tensor) -> Groups:
        columns, many = number.shape[-1], int(number.max()) + 1
        order = number.argsort(-1)
        sizes = number.new_zeros(*number.shape[:-1], many).scatter_add(-1, number, torch.ones_like(number))
        size = int(sizes.max())
        if size * many > WASTE * columns:
            return Groups(number, many, None)
        each = torch.arange(columns, device=number.device).expand_as(number)
        nth = torch.empty_like(number).scatter(-1, order, each) - (sizes.cumsum(-1) - sizes).gather(-1, number)
        place = nth * many + number
        table = number.new_full((*number.shape[:-1], size * many), columns).scatter(-1, place, each)
        return Groups(number, many, (table, place))

    def sums(self, x: Tensor) -> Tensor:
        """What the columns of each group add up to, `[... r groups]`."""
        if self.laid is not None:
            return _laid(x, self.laid[0], self.many, 0.0).sum(-2)
        return x.new_zeros(*x.shape[:-1], self.many).scatter_add(-1, self.number.expand_as(x), x)

    def softmax(self, scores: Tensor, among: Tensor, share: Tensor | None = None) -> Tensor:
        """Over some columns of each group, and zero elsewhere.

        Each is multiplied by its group's `share [... r groups]` where there is one.
        """
        low, near = torch.finfo(scores.dtype).min, left_out(among, scores)
        hidden = scores if near is None else lowered(scores, among, near=near)
        if self.laid is not None:
            table, place = self.laid
            found = _laid(hidden, table, self.many, low).softmax(-2)
            found = (found if share is None else found * share[..., None, :]).flatten(-2)
            found = found.gather(-1, place.expand_as(scores))
            return found if near is None else zeroed(found, among, into=True, near=near)
        number, groups = self.number.expand_as(scores), (*scores.shape[:-1], self.many)
        highest = scores.new_full(groups, low).scatter_reduce(-1, number, hidden.detach(), "amax")
        highest = highest.where(highest > low, 0.0)  # of one without any, whose powers thus are zeros like the others'
        raised = (hidden - highest.gather(-1, number)).exp_()
        sums = scores.new_zeros(groups).scatter_add(-1, number, raised)
        each = (1.0 if share is None else share) / sums.where(sums > 0, 1.0)
        return raised * each.gather(-1, number)


def _laid(x: Tensor, table: Tensor, many: int, fill: float) -> Tensor:
    """Columns in the table `[... r size groups]`, and `fill` where it has none."""
    if table.shape[-1] > x.shape[-1]:
        x = pad(x, (0, 1), value=fill)
    return x.gather(-1, table.expand(*x.shape[:-1], -1)).unflatten(-1, (-1, many))
