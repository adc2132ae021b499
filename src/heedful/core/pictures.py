"""Images made smaller, to be kept and shown."""

from __future__ import annotations

import torch
from torch import Tensor


def shrunk(images: Tensor, side: int) -> Tensor:
    """Images `[b c rows cols]` of so many pixels at most on the longer side, each the mean of what it stands for."""
    size = [max(1, round(n * min(1.0, side / max(images.shape[2:])))) for n in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size, mode="area")
