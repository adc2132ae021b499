"""What goes by how far a key stands behind its query, laid out for a tile."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, arange

from heedful.core.call import Call


def followed(call: Call) -> int | None:
    """How far the first query is ahead of the first key, where tokens follow one another; None where they do not."""
    q, k = call.q_pos, call.k_pos
    ahead = (q[..., :1] - k[..., :1]).flatten()
    return int(ahead[0]) if bool((q.diff() == 1).all() & (k.diff() == 1).all() & (ahead == ahead[0]).all()) else None


def diagonals(call: Call) -> Tensor | None:
    """Each distance of a call whose tokens follow one another, once, the farthest first; None of others.

    A query's keys have those from its own place in the queries, counted from the last, on.
    """
    ahead, device = followed(call), call.q_pos.device
    if ahead is None:
        return None
    return arange(ahead + len(call.queries) - 1, ahead - len(call.keys), -1, device=device)


def by_distance(of: Callable[[Tensor], Tensor], call: Call) -> Tensor:
    """What `of` says of whole distances `[m]`, as `[h|1 m]`, for each pair of a tile, `[b|1 h|1 r k]`.

    Where tokens follow one another it is asked for each distance once, and a row is a stretch of its answer.
    """
    if (apart := diagonals(call)) is None:
        far = call.distance
        low = int(far.amin())
        found = of(arange(low, int(far.amax()) + 1, device=far.device))
        return found[:, far - low].flatten(1, 2).transpose(0, 1) if far.shape[1] == 1 else _by_head(found, far - low)
    return laid(of(apart), len(call.keys))[None]


def laid(found: Tensor, keys: int) -> Tensor:
    """What is told of the `diagonals` of a call, `[... q+k-1]`, for each pair, `[... q k]`."""
    upwards = found.unfold(-1, keys, 1)  # the last row first
    return upwards.index_select(-2, arange(upwards.shape[-2] - 1, -1, -1, device=found.device))


def _by_head(found: Tensor, where: Tensor) -> Tensor:
    """Entries of `[h|1 m]` at places that heads have of their own, `[b|1 h r k]`."""
    found = found.expand(where.shape[1], -1)
    return found[arange(len(found), device=where.device)[:, None, None], where]
