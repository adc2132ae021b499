"""Sets of key columns, as of a whole tile, in sorted, disjoint ranges; `core.key_ranges` has one for each query."""

from __future__ import annotations

Ranges = tuple[tuple[int, int], ...]
GATHER_BELOW = 0.7  # scattered columns are copied together when they are at most this share of the range they span


def union(a: Ranges, b: Ranges) -> Ranges:
    """The union of two sets of half-open ranges, sorted and disjoint."""
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(r for r in a + b if r[0] < r[1]):
        if out and lo <= out[-1][1]:
            out[-1] = (out[-1][0], max(hi, out[-1][1]))
        else:
            out.append((lo, hi))
    return tuple(out)


def intersection(a: Ranges, b: Ranges) -> Ranges:
    """The intersection of two sets of half-open ranges."""
    for one, many in ((a, b), (b, a)):
        if len(one) == 1 < len(many) and all(one[0][0] <= lo and hi <= one[0][1] for lo, hi in many):
            return union(many, ())  # where keys were picked there may be hundreds
    return union(tuple((max(p, r), min(q, s)) for p, q in a for r, s in b), ())
