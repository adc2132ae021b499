"""The rotary embedding: pairs of a head's dimensions turn with the place of the token, the first pairs fastest."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Queries or keys `[b h n d]` of tokens at `places` `[b|1 1 n]`; dimension j turns with j + d/2, as in Llama."""
    half = x.shape[-1] // 2
    speeds = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)  # radians a token
    angles = places[..., None].to(torch.float32) * speeds
    cos, sin = (turn.to(x.dtype) for turn in (angles.cos(), angles.sin()))
    one, other = x.split(half, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)
