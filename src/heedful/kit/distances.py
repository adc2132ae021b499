"""What goes by how far a key stands behind its query, laid out for a tile."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, arange

from heedful.core.call import Call


def by_distance(of: Callable[[Tensor], Tensor], call: Call) -> Tensor:
    """What `of` says of whole distances `[m]`, as `[h|1 m]`, for each pair of a tile, `[b|1 h|1 r k]`.

    Where tokens follow one another it is asked for each distance once, and a row is a stretch of its answer.
    """
    q, k = call.q_pos, call.k_pos
    ahead = (q[..., :1] - k[..., :1]).flatten()
    if not bool((q.diff() == 1).all() & (k.diff() == 1).all() & (ahead == ahead[0]).all()):
        far = call.distance
        low = int(far.amin())
        found = of(arange(low, int(far.amax()) + 1, device=far.device))
        return found[:, far - low].flatten(1, 2).transpose(0, 1) if far.shape[1] == 1 else _by_head(found, far - low)
    rows, keys = q.shape[-1], k.shape[-1]
    low = int(ahead[0]) - keys + 1
    found = of(arange(low, low + rows + keys - 1, device=q.device))
    upwards = found.flip(-1).unfold(-1, keys, 1)  # the last row first
    return upwards.index_select(-2, arange(rows - 1, -1, -1, device=q.device))[None]


def _by_head(found: Tensor, where: Tensor) -> Tensor:
    """Entries of `[h|1 m]` at places that heads have of their own, `[b|1 h r k]`."""
    found = found.expand(where.shape[1], -1)
    return found[arange(len(found), device=where.device)[:, None, None], where]
