"""Which keys the one query of each head sees, as a kernel for GPUs takes them: in a row, or one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.ragged import Ragged
from heedful.engine.needs import Needs


@dataclass(frozen=True, eq=False)
class Keys:
    """Columns from the first of `ends [b u 2]` on, or so many of the `places [b u c]`, for each unit of heads that see
    the same; `base [b g]` is the line where column 0 of a head lies among those of all.
    """

    ends: Tensor
    longest: int  # the most that a unit sees
    places: Tensor | None = None
    base: Tensor | None = None


def seen(call: Call, needs: Needs, k: Tensor) -> Keys | None:
    """None where a head sees several stretches, which kernels for many queries read as they are."""
    b, heads = k.shape[0], call.heads
    base = first = None
    if isinstance(k, Ragged):
        base, first = k.table.view(*k.shape[:2], 2).movedim(-1, 0).contiguous().to(k.device)
        if needs.sees_all:
            return Keys(_int(torch.stack([first, torch.full_like(first, k.shape[2])], -1)), k.shape[2], None, base)
    keep = call.mask.keeps(call.tile(slice(0, 1), slice(0, k.shape[2])).pairs)
    if base is None and (keep is None or bool(keep.all())):
        ends = torch.tensor([0, k.shape[2]], dtype=torch.int32, device=k.device)
        return Keys(ends.expand(b, k.shape[1], 2).contiguous(), k.shape[2])
    ranges = None if call.mask.blocks else needs.key_ranges
    if ranges is not None and ranges.shape[3] == 1:
        ends = _units(ranges[:, :, 0, 0].expand(b, -1, -1), heads, k.shape[1])
        return Keys(_int(ends), k.shape[2], None, base)
    if ranges is not None and base is None:
        return None
    if keep is None:
        raise ValueError("a mask that keeps all has one range")
    keep = _units(keep[:, :, 0].expand(b, -1, -1), heads, k.shape[1])
    count = keep.sum(-1)
    most = int(count.max())
    places = keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : max(1, most)]
    return Keys(_int(torch.stack([torch.zeros_like(count), count], -1)), most, _int(places), base)


def _int(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _units(x: Tensor, heads: int, key_heads: int) -> Tensor:
    """What is said of each head, `[b h|1 ...]`, of all that share keys at once where they are alike."""
    if x.shape[1] == 1:
        return x.expand(-1, key_heads, -1)
    if x.shape[1] != heads:
        return x
    groups = x.unflatten(1, (key_heads, -1))
    return groups[:, :, 0] if bool((groups == groups[:, :, :1]).all()) else x
