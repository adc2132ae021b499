"""Blocks of a call in which every token sees every token, and how well the means of their queries and keys suit."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, SiteError
from heedful.kit.blocks import fold, means
from heedful.kit.running import wide


def sees_all(call: Call) -> bool:
    """Whether all tokens of one sequence see one another."""
    return not call.cross and not call.mask.rules and len(call.queries) == len(call.keys)


class Pooled:
    """Blocks are counted from the first token; the last may be shorter, and behind its end stand zeros."""

    def __init__(self, call: Call, size: int) -> None:
        if call.query is None or call.key is None or call.value is None:
            raise SiteError(f"layer {call.layer}: queries, keys and values are known from MASK on")
        self._size, self._tokens = size, len(call.queries)
        self.filled = fold(torch.ones(1, 1, self._tokens, dtype=torch.bool, device=call.query.device), size, None)
        q, k, v = wide(call.query, call.spread(call.key), call.spread(call.value))
        self.query, self.key, self.value = (fold(x, size, None) for x in (q, k, v))  # [b h m size d]
        self.scores = call.capped(call.scale * self.mean(self.query) @ self.mean(self.key).mT)  # [b h m m]

    def mean(self, x: Tensor) -> Tensor:
        """Of each block's tokens, `[b h m d]`."""
        return means(x, self.filled)

    def rows(self, x: Tensor) -> Tensor:
        """Something of blocks `[b h m c]` by token, `[b h n c]`."""
        return x.repeat_interleave(self._size, 2)[:, :, : self._tokens]

    def apart(self, x: Tensor) -> Tensor:
        """Something of the tokens of blocks `[b h m size c]`, `[b h n c]`."""
        return x.flatten(2, 3)[:, :, : self._tokens]


def ranks(x: Tensor) -> Tensor:
    """The place of each entry in its row, the highest first and so 0."""
    return x.argsort(-1, descending=True).argsort(-1)
