"""Choosing single keys for a group of queries at a time: what the methods that read by stripes have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import field, replace

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.ranges import PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.blocks import Grid
from heedful.kit.chosen import Chosen


class StripeSparse(Method, abstract=True):
    """Reads a prompt by some keys alone, which a group of queries shares; decoding sees all keys."""

    causal = False  # a group of queries chooses as one, by its later rows too
    chunk_invariant = False  # groups of queries begin with the call
    block: PositiveInt = field(default=64, kw_only=True)  # queries in a block

    @property
    def group(self) -> int:
        """How many queries share their keys."""
        return self.block

    @abstractmethod
    def choose(self, grid: Grid) -> Tensor:
        """Which keys of each text every group of queries sees, `[b|1 h|1 n k]`; true where no query sees any."""

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        grid = Grid.of(replace(call, mask=mask), self.block)
        if grid is None:
            return mask
        table = self.choose(grid) | ~grid.cols.flatten(2)[:, :, None]
        if bool(table.all()):
            return mask
        begins = torch.zeros(1, 2, dtype=torch.long, device=table.device) if grid.first is None else grid.first
        table = table.expand(max(len(table), len(begins)), *table.shape[1:])
        text = torch.arange(len(table), device=table.device)[:, None]
        group = (torch.arange(len(call.queries), device=table.device) - begins[:, :1]).clamp(min=0) // self.group
        key = (torch.arange(len(call.keys), device=table.device) - begins[:, 1:]).clamp(min=0)

        def pick(rows: slice) -> Tensor:
            seen = table[text, :, group[:, rows]].transpose(1, 2)  # [b h r k], by the text's own columns
            return seen.gather(-1, key[:, None, None].expand(*seen.shape[:3], -1))

        return mask & Chosen(pick)
