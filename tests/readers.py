"""What the tests of readers share."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(short: Tensor, long: Tensor, left: bool) -> dict[str, Tensor]:
    """Two texts `[1 n]` in one batch, the shorter with padding on its left or right."""
    pad, one = torch.full((1, long.shape[1] - short.shape[1]), 90), torch.ones_like(short)
    ids = torch.cat([torch.cat([pad, short] if left else [short, pad], 1), long])
    mask = torch.cat([torch.cat([0 * pad, one] if left else [one, 0 * pad], 1), torch.ones_like(long)])
    return {"input_ids": ids, "attention_mask": mask}
