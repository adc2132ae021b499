"""How values are shown: their text in a notebook, and images made smaller, to be kept."""

from __future__ import annotations

from html import escape

import torch
from torch import Tensor


def printed(value: object) -> str:
    """What a notebook shows of a value: its text as it is printed."""
    return f'<pre style="line-height:1.35; overflow-x:auto">{escape(str(value))}</pre>'


def shrunk(images: Tensor, side: int) -> Tensor:
    """Images `[b c rows cols]` of so many pixels at most on the longer side, each the mean of what it stands for."""
    size = [max(1, round(n * min(1.0, side / max(images.shape[2:])))) for n in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size, mode="area")
