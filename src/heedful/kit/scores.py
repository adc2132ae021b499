"""Scores of some queries and keys as the model makes them, for methods that look before they choose."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.kit.seen import softmax_over


def scores_of(query: Tensor, key: Tensor, call: Call, rows: slice | Tensor) -> Tensor:
    """Queries `[b h r d]` times keys `[b g k d]`, scaled, soft-capped and biased as in the call, `[b h r k]`.

    `rows` tells which of the call's rows the queries are: a slice, or their numbers in each text `[b|1 r]`.
    """
    b, h, r, d = query.shape
    packed = query.reshape(b, key.shape[1], -1, d)  # a group's heads above one another
    found = call.capped((packed @ key.mT * call.scale).view(b, h, r, -1))
    return found if call.bias is None else found + _of_rows(call.bias, rows).to(found.dtype)


def _of_rows(bias: Tensor, rows: slice | Tensor) -> Tensor:
    if bias.shape[2] == 1:
        return bias
    if isinstance(rows, slice):
        return bias[:, :, rows]
    texts = max(len(bias), len(rows))
    index = rows[:, None, :, None].expand(texts, bias.shape[1], -1, bias.shape[3])
    return bias.expand(texts, -1, -1, -1).gather(2, index)


def last_queries(call: Call, count: int) -> tuple[Tensor, slice | Tensor, Tensor]:
    """The last queries of each text `[b h w d]`, rows `[b w]` and positions `[b|1 1 w]`, -1 where there is none."""
    query = cast(Tensor, call.query)
    if call.one_token:
        return query, slice(0, 1), call.q_pos
    back = torch.arange(min(count, len(call.queries)) - 1, -1, -1, device=query.device)
    rows = (call.last[..., None] - back).expand(len(query), 1, -1)
    place = call.q_pos.masked_fill(~call.is_text, -1).expand(len(query), 1, -1)
    position = place.gather(2, rows.clamp(min=0)).masked_fill(rows < 0, -1)
    rows = rows.clamp(min=0)
    index = rows[..., None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index), rows[:, 0], position


def last_weights(entries: CachedKV, call: Call, count: int) -> tuple[Tensor, Tensor]:
    """Softmax weights `[b h w k]` that each text's last queries give to the entries, and those queries' positions.

    They know of causality, padding, soft cap and bias, and of no narrower mask or learned sink.
    """
    queries, rows, position = last_queries(call, count)
    return entry_weights(entries, call, queries, rows, position), position


def entry_weights(entries: CachedKV, call: Call, queries: Tensor, rows: slice | Tensor, position: Tensor) -> Tensor:
    """Softmax weights `[b h r k]` that queries `[b h r d]` at their positions `[b|1 1 r]` give to the entries."""
    found = scores_of(queries.float(), entries.key.float(), call, rows)
    if call.one_token and entries.whole and call.queries.end >= entries.positions.end:
        return found.softmax(-1)
    seen = entries.is_text[:, :, None] & (entries.positions.position[:, :, None] <= position[..., None])
    return softmax_over(found, call.spread(seen))
