"""Rows of tensors, taken whole: on a CPU torch copies them many times faster than one number after another."""

from __future__ import annotations

import torch
from torch import Tensor


def taken(x: Tensor, where: Tensor) -> Tensor:
    """The rows `[b|1 h|1 m]` of something `[b h n d]`, in that order, `[b h m d]`."""
    texts, heads, n, width = x.shape
    at = where + torch.arange(0, texts * heads * n, n, device=x.device).view(texts, heads, 1)
    return x.reshape(-1, width).index_select(0, at.flatten()).view(*at.shape, width)
