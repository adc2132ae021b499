"""Which key columns each query sees, as few ranges a row: `[b|1, h|1, q, n, 2]`, half open, sorted and disjoint.

Causal, sliding, padded and sink-and-window masks all are one or two ranges a row; a kernel takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 8  # ranges a row; a mask with more is no matter for ranges


def single(lo: Tensor | int, hi: Tensor) -> Tensor:
    """One range a row, from its ends `[b|1, h|1, q]`."""
    lo = torch.as_tensor(lo, device=hi.device)
    return tidy(torch.stack(torch.broadcast_tensors(lo, hi), -1)[..., None, :])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """What both keep."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    lo, hi = torch.maximum(a[..., 0], b[..., 0]), torch.minimum(a[..., 1], b[..., 1])
    return tidy(torch.stack([lo, hi], -1).flatten(-3, -2))


def union(a: Tensor, b: Tensor) -> Tensor:
    """What one or the other keeps."""
    shape = torch.broadcast_shapes(a.shape[:3], b.shape[:3])
    return tidy(torch.cat([a.expand(*shape, *a.shape[3:]), b.expand(*shape, *b.shape[3:])], -2))


def tidy(rows: Tensor) -> Tensor:
    """Sorted and disjoint; empty ranges are 0, and cut off where they stand last in every row."""
    rows = rows.clamp(min=0)
    empty = rows[..., 0] >= rows[..., 1]
    if rows.shape[-2] > 1:
        order = rows[..., 0].masked_fill(empty, torch.iinfo(rows.dtype).max).argsort(dim=-1, stable=True)
        rows, empty = rows.gather(-2, order[..., None].expand(rows.shape)), empty.gather(-1, order)
        reached = rows[..., 1].masked_fill(empty, 0).cummax(-1).values
        rows = rows.clone()
        rows[..., 1:, 0] = torch.maximum(rows[..., 1:, 0], reached[..., :-1])
        empty = rows[..., 0] >= rows[..., 1]
        rows = rows[..., : max(1, int((~empty).sum(-1).amax())) if bool(_packed(empty)) else rows.shape[-2], :]
        empty = empty[..., : rows.shape[-2]]
    return rows.masked_fill(empty[..., None], 0)


def _packed(empty: Tensor) -> Tensor:
    """Whether in every row no range follows an empty one."""
    return (empty[..., :-1] <= empty[..., 1:]).all()


def encode(keeps: Callable[[int, int], Tensor], queries: int, block: int = 512) -> Tensor | None:
    """The ranges of any mask, from its blocks of rows `[b|1, h|1, r, k]`; None where some row needs more than MOST."""
    parts = []
    for start in range(0, queries, block):
        kept = torch.nn.functional.pad(keeps(start, min(start + block, queries)), (1, 1))
        changes = (kept[..., 1:] ^ kept[..., :-1]).flatten(0, -2)  # where a row begins and ceases to see, in turns
        if int(changes.count_nonzero()) > 2 * MOST * len(changes):
            return None  # some row has too many: told before the places of all are held
        row, column = changes.nonzero(as_tuple=True)
        count = row.bincount(minlength=len(changes))
        most = max(2, int(count.amax()))
        if most > 2 * MOST:
            return None
        part = torch.zeros(len(count), most, dtype=torch.long, device=kept.device)
        part[row, torch.arange(len(row), device=kept.device) - (count.cumsum(0) - count)[row]] = column
        parts.append(part.view(*kept.shape[:-1], most // 2, 2))
    most = max(p.shape[-2] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, 0, 0, most - p.shape[-2])) for p in parts], 2)


def counts(rows: Tensor, weight: Tensor, keys: int) -> Tensor:
    """How much the queries that see each key weigh, `[b h k]`: `weight [b h q n]` stands for every range."""
    steps = rows.new_zeros(*rows.shape[:2], keys + 1, dtype=torch.float32)
    for end, sign in ((0, 1.0), (1, -1.0)):
        steps.scatter_add_(-1, rows[..., end].flatten(2), sign * weight.flatten(2))
    return steps.cumsum(-1)[..., :-1]
