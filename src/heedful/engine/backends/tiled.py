"""Blocks of query rows in plain torch: memory grows with N, and key columns that no row may see are never touched.

Where gradients are asked of a long call, blocks are computed again on the way back, so that no map is kept for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.column_ranges import GATHER_BELOW, Ranges
from heedful.core.paper import Paper
from heedful.core.values import replace
from heedful.engine.again import recomputed
from heedful.engine.attend import tile
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.parted import TILE_BYTES, Compute, in_parts, parts_of
from heedful.engine.needs import Needs
from heedful.engine.precision import wide
from heedful.engine.reweighting import resolved

PAPER = Paper(
    "P166",
    "Self-attention Does Not Need O(n^2) Memory",
    "Markus N. Rabe and Charles Staats",
    2021,
    "2112.05682",
    differs=(
        "Queries alone are divided, since edits of a row want all of its keys: a block's rows are longer in a longer "
        "text, and fewer.",
        "Calls whose map takes less than 64 MB keep their blocks for the way back.",
    ),
)

SMALLER = 2  # times are tiles of which many maps are held at once: by steps, or for their way back
KEPT_BYTES = 64 << 20  # of a call's scores that the way back may find kept
ROOM_BYTES = 31 << 20  # the largest piece of memory by which glibc learns how much to hold on to
LEAST, MOST = 16, 256  # rows of a tile
EVEN = 8  # what they are a multiple of, so that threads share them evenly


def _computed(job: AttentionCall, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads of a tile."""
    return tile(job, call, q, k, v)[0]


class Tiled:
    name = "tiled"

    def __init__(self, rows: int | None = None, compute: Compute = _computed) -> None:
        self.rows = rows
        self.compute = compute

    def refuses(self, needs: Needs) -> list[str]:
        reasons = [f"{step} must see the whole map at once" for step in needs.whole_map]
        if needs.pattern:
            reasons.append("the whole pattern was asked for (output_attentions), which tiles never hold")
        return reasons

    def tile_rows(self, b: int, h: int, k: int, smaller: bool = False) -> int:
        size = TILE_BYTES // SMALLER if smaller else TILE_BYTES
        rows = min(MOST, size // max(1, 4 * b * h * k))
        return self.rows or max(LEAST, rows - rows % EVEN)

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        _hold_on()
        # of several texts whose tokens stand before their heads, keys would be copied anew for each tile
        q, k, v = wide(q), wide(k).contiguous(), wide(v).contiguous()
        if job.bias is not None and job.bias.shape[-2] == 1:  # every tile's rows give it a gradient, to be added up
            job = replace(job, bias=wide(job.bias))
        job = resolved(job, lambda first: self._all(first, q, k, v))
        return self._all(job, q, k, v), None

    def _all(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        needs = job.needs or Needs()
        again = needs.gradients and not needs.transformed and _bytes(job.call, len(q)) > KEPT_BYTES
        if not (needs.gradients or needs.transformed or needs.map_steps):  # a step may keep what it is shown
            job = replace(job, spare=job.run_state.now.spare)
        if self.rows is None and (gathered := parts_of(job)):
            return in_parts(job, gathered, self.compute, (q.contiguous(), k, v))
        rows = self._blocks(job, q.shape[0], again or bool(needs.map_steps))
        blocks = (partial(self.block, rows=some, q=q, k=k, v=v) for some in rows)
        heads = [recomputed(block, job) if again else block(job) for block in blocks]
        return heads[0] if len(heads) == 1 else torch.cat(heads, 2)

    def _blocks(self, job: AttentionCall, texts: int, smaller: bool) -> Iterator[slice]:
        """Rows for each tile, as many as its bytes allow: the first ones of a causal text see few columns."""
        call, start, total = job.call, job.call.earlier, len(job.call.queries)
        while start < total:
            step = self.rows or LEAST
            if self.rows is None and total - start > LEAST:
                rows = slice(start, min(start + MOST, total))
                cols = _seen(call, rows, between=job.plan.above > 0)
                width = cols.stop - cols.start if isinstance(cols, slice) else len(cols)
                step = self.tile_rows(texts, call.heads, width, smaller)
            yield slice(start, min(start + step, total))
            start += step

    def block(self, job: AttentionCall, rows: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The heads of some rows, for a job whose reweightings are known."""
        above = min(job.plan.above, rows.start)
        call, cols = _cut(job.call, slice(rows.start - above, rows.stop), above if job.plan.above else None)
        rows = call.rows
        return self.compute(job, call, wide(q[:, :, rows]), wide(k[:, :, cols]), wide(v[:, :, cols]))


@cache
def _hold_on() -> None:
    """Let the system's allocator hold on to what tiles give back, as it does once it was given back as large a piece.

    Otherwise it hands a tile's maps to the system and asks for them anew, which takes as long as a softmax does.
    """
    torch.empty(ROOM_BYTES, dtype=torch.uint8, device="cpu")


def _bytes(call: Call, texts: int) -> int:
    """What the scores of a whole call would take."""
    return 4 * texts * call.heads * len(call.queries) * len(call.keys)


def _cut(call: Call, rows: slice, above: int | None) -> tuple[Call, slice | Tensor]:
    """The tile's call with its pairs, narrowed to the key columns that some of its rows may see.

    Where edits look at neighbours, `above` of the rows are there for that, and so are all keys between the first and
    the last, so that neighbours in the tile are neighbours in the text.
    """
    part = call.tile(rows, _seen(call, rows, between=above is not None))
    return replace(part, keep=call.mask.keeps(part.pairs), above=above or 0), part.cols


def _seen(call: Call, rows: slice, between: bool) -> slice | Tensor:
    """The key columns that some of the rows may see, and perhaps those between them."""
    ranges = call.mask.columns(call.queries.take(rows), call.keys, rows)
    if between and ranges:
        ranges = ((ranges[0][0], ranges[-1][1]),)
    return _columns(ranges, call.queries.index.device)


def _columns(ranges: Ranges, device: torch.device) -> slice | Tensor:
    if not ranges:
        return slice(0, 1)  # nobody sees anything: one masked column keeps the shapes honest
    lo, hi = ranges[0][0], ranges[-1][1]
    count = sum(b - a for a, b in ranges)
    if count > GATHER_BELOW * (hi - lo):
        return slice(lo, hi)
    starts, ends = torch.tensor(ranges, device=device).unbind(1)
    sizes = ends - starts
    shifts = starts - (sizes.cumsum(0) - sizes)  # of a range's columns, from where they come in the row of all
    return torch.arange(count, device=device) + shifts.repeat_interleave(sizes, output_size=count)
