"""What queries see of a tile: how many keys, and numbers of the pairs that are computed."""

from __future__ import annotations

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
