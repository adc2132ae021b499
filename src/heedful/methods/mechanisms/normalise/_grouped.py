"""A softmax over some columns of each group of columns by itself."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_by_group(scores: Tensor, among: Tensor, number: Tensor) -> Tensor:
    """Over some columns of each group; `number` is each column's group, from 0 up. Elsewhere it is zero."""
    low = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~among, low)
    highest = torch.full_like(scores, low).scatter_reduce(-1, number, scores.detach(), "amax").gather(-1, number)
    raised = (scores - highest).exp().masked_fill(~among, 0.0)
    sums = torch.zeros_like(raised).scatter_add(-1, number, raised).gather(-1, number)
    return raised / sums.masked_fill(~among, 1.0)
