"""Keys that a model's own indexer chose for each query, which it hands over as lists of numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from heedful.core.errors import UnknownArgument

LISTS = frozenset({"indices", "block_indices"})


def chosen_pairs(module: nn.Module, more: dict[str, Any], heads: int, keys: int) -> Tensor | None:
    """A table `[b h|1 q k]` of the chosen pairs; None when the model chooses none apart from its mask."""
    if isinstance(found := more.get("indices"), Tensor):
        while found.ndim < 4:
            found = found[:, None]
        return _named(found, keys)
    if isinstance(found := more.get("block_indices"), Tensor):
        size = getattr(getattr(module, "indexer", None), "block_size", None)
        if not isinstance(size, int) or heads % found.shape[1]:
            raise UnknownArgument(
                f"{type(module).__name__} hands its attention a choice of key blocks, but does not tell their size"
            )
        table = _named(found, -(-keys // size)).repeat_interleave(size, -1)[..., :keys]
        return table.repeat_interleave(heads // found.shape[1], 1)
    return None


def _named(numbers: Tensor, count: int) -> Tensor:
    """Which of `count` slots the last axis names; -1 names none."""
    table = torch.zeros(*numbers.shape[:-1], count + 1, dtype=torch.bool, device=numbers.device)
    slots = numbers.long().masked_fill((numbers < 0) | (numbers >= count), count)
    return table.scatter_(-1, slots, True)[..., :count]
