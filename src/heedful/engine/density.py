"""How much of a call is computed."""

from __future__ import annotations

from heedful.core.call import Call


def density_of(call: Call, rows: int = 256) -> float:
    """The share of query-key pairs that the call's mask computes."""
    q, k = len(call.queries), len(call.keys)
    kept = total = 0
    for start in range(0, q, rows):
        part = call.tile(slice(start, min(start + rows, q)), slice(0, k))
        keep = call.mask.keeps(part.pairs)
        size = len(part.queries) * k
        total += size
        kept += size if keep is None else int(keep.sum()) * size // max(1, keep.numel())
    return kept / max(1, total)
