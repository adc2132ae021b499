"""What is said of each token as it is read, and asked again when it is a key: kept with the cache of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.positions import spread_heads
from heedful.core.state import ByIndex

UNKNOWN = -torch.inf  # of tokens that a cache took up without the method


def of_keys(call: Call, name: str, own: Tensor) -> Tensor:
    """What is said of the call's tokens `[b h|g n c]` and was of those before them, by key, `[b h|g k c]`."""
    first = call.queries.first or 0
    if first:
        before = call.state.cache.get(name, own[:, :, :0])[:, :, :first]
        lost = own.new_full((*own.shape[:2], first - before.shape[2], own.shape[3]), UNKNOWN)
        own = torch.cat([before, lost, own], 2)
    call.state.cache[name] = ByIndex(own, 2)
    where = spread_heads(call.keys.index, own.shape[1]).clamp(max=own.shape[2] - 1)
    return own.gather(2, where.expand(*own.shape[:2], -1)[..., None].expand(-1, -1, -1, own.shape[3]))
