"""Maps that a method makes itself, a piece at a time, and of those no columns that none of their rows may see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from heedful.core.call import Call

PIECE = 1 << 20  # numbers of maps that are held at once: few such pieces lie in a last-level cache
LEAST = 16  # rows at once, as many as a product wants


def tiles(call: Call, texts: int) -> Iterator[Call]:
    """The call's rows with the columns between the first and the last that some of them may see, and what they keep."""
    step = max(LEAST, PIECE // (texts * call.heads * len(call.keys)))
    for start in range(0, len(call.queries), step):
        rows = slice(start, start + step)
        seen = call.mask.columns(call.queries.take(rows), call.keys, rows) or ((0, 1),)
        part = call.tile(rows, slice(seen[0][0], seen[-1][1]))
        yield replace(part, keep=call.mask.keeps(part.pairs))
