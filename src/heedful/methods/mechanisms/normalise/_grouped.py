"""A softmax over some columns of each group of columns by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.flags import lowered


def softmax_by_group(scores: Tensor, among: Tensor, number: Tensor, share: Tensor | None = None) -> Tensor:
    """Over some columns of each group, and zero elsewhere; `number` is each column's group from 0 up, in all rows.

    Each is multiplied by its group's `share [b h r groups]` where there is one.
    """
    low = torch.finfo(scores.dtype).min
    scores, groups = lowered(scores, among), (*scores.shape[:-1], int(number[..., 0, :].max()) + 1)
    highest = scores.new_full(groups, low).scatter_reduce(-1, number, scores.detach(), "amax")
    highest = highest.where(highest > low, 0.0)  # of a group without any, whose powers thus are zeros like the others'
    raised = (scores - highest.gather(-1, number)).exp_()
    sums = scores.new_zeros(groups).scatter_add(-1, number, raised)
    each = (1.0 if share is None else share) / sums.where(sums > 0, 1.0)
    return raised * each.gather(-1, number)
