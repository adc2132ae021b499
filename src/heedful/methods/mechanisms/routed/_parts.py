"""What shapes parts of images, from maps `[b parts+1 rows cols]` that sum to one; the background is the last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REACH = 3  # places along each side over which a map is averaged, before its highest place counts


def shaping(maps: Tensor) -> Tensor:
    """What the authors add up, in their weights."""
    return absence(maps[:, :-1]) + 2 * foreground(maps[:, -1]) + raggedness(maps) + doubt(maps)


def absence(maps: Tensor) -> Tensor:
    """How far each part is from being found in any of the images."""
    return 1 - F.avg_pool2d(maps, REACH, stride=1).flatten(2).amax((0, 2)).mean()


def foreground(ground: Tensor) -> Tensor:
    """How far the background `[b rows cols]` is from being found in each image, near its borders rather than inside."""
    near = F.avg_pool2d(ground[:, None], REACH, stride=1)[:, 0]
    rows, cols = (torch.linspace(-1, 1, n, dtype=near.dtype, device=near.device) for n in near.shape[1:])
    out = rows[:, None] ** 2 + cols**2
    highest = (near * out / out.max()).flatten(1).amax(1)
    return F.binary_cross_entropy(highest, torch.ones_like(highest))


def raggedness(maps: Tensor) -> Tensor:
    """How much maps change from place to place."""
    apart = maps.diff(dim=2).abs().sum() + maps.diff(dim=3).abs().sum()
    return apart / (len(maps) * maps.shape[2] * maps.shape[3])


def doubt(maps: Tensor) -> Tensor:
    """Entropy of what a place is of, the mean of all places."""
    return -(maps * maps.clamp(min=torch.finfo(maps.dtype).eps).log()).sum(1).mean()
