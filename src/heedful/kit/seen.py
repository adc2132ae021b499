"""What queries see of a tile: how many keys, numbers of the pairs that are computed, and weights of these alone."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.flags import numbers, zeroed


def how_many(call: Call, like: Tensor) -> Tensor:
    """How many keys each query of a tile `like [b h r k]` sees, 1 where it sees none, `[b|1 h|1 r|1 1]`."""
    if call.keep is None:
        return like.new_full((1, 1, 1, 1), like.shape[-1])
    return numbers(call.keep, like).sum(-1, keepdim=True).clamp(min=1)


def only_seen(x: Tensor, call: Call, into: bool = False) -> Tensor:
    """Numbers `[b h r k]` of the pairs that are computed, and zero of the others; `into` itself where it may."""
    return x if call.keep is None else zeroed(x, call.keep, into=into)


def softmax_over(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Softmax over what each row keeps (None: all); zeros elsewhere, and in a row that keeps nothing."""
    if keep is None:
        return scores.softmax(-1)
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~keep, 0.0)
