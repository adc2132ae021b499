"""Attention and its pattern's summary as Triton kernels: no map is ever held, and masks are ranges of keys.

`attend_rows` packs rows: heads that share keys stand side by side for each query, so that keys are read once for all of
them. What a kernel is not asked for is None, and no code is made for it. Tiles that a mask leaves out are skipped: with
one range to a row by where loops begin and end, without a condition inside, so that the compiler loads the next tile
meanwhile; with several, or a table of blocks, by a condition.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

SCAN = tl.constexpr(512)  # rows that are asked at once which keys they see


class Lines(NamedTuple):
    """A tensor `[b h n d]` with its strides; the last axis has no gaps."""

    at: Tensor
    b: int
    h: int
    n: int


class Sizes(NamedTuple):
    """Heads, heads to each head of keys, queries, keys, and the widths of keys, values and carried columns."""

    heads: int
    group: int
    n: int
    m: int
    d: int
    e: int
    c: int
    scale: float
    softcap: float | None
    widened: int | None  # not None where products want float32: triton's interpreter has no other bfloat16
    sigmoid: float | None = None  # added to scores whose sigmoids are the weights; None where they are not
    relu: float | None = None  # the same of what is rectified; where both are None weights are a softmax


class Keep(NamedTuple):
    """Which pairs are computed: ranges of keys for each query, a table of blocks, and which queries are text."""

    ranges: Tensor
    b: int
    h: int
    table: Tensor | None
    table_b: int
    table_h: int
    units: int  # heads of the table
    columns: int
    size: int  # of a block
    is_text: Tensor | None
    text_b: int


class Found(NamedTuple):
    """Where `attend_rows` writes what it is asked for: `[splits b h n]`, but for `out [splits b n h e]`."""

    out: Tensor
    lse: Tensor
    entropy: Tensor | None
    peak: Tensor | None
    place: Tensor | None
    first: Tensor | None
    carried: Tensor | None


@triton.jit
def _kept(keep, size, batch, head, query, col, RANGES: tl.constexpr):
    """Which pairs lie in a range of their query `[rows cols]`."""
    at = keep.ranges + batch * keep.b + _wide(head + 0 * query) * keep.h + query * (2 * RANGES)
    found = query[:, None] < 0
    for r in tl.static_range(RANGES):
        lo = tl.load(at + 2 * r, mask=query < size.n, other=0)
        hi = tl.load(at + 2 * r + 1, mask=query < size.n, other=0)
        found = found | ((col[None, :] >= lo[:, None]) & (col[None, :] < hi[:, None]))
    return found


@triton.jit
def _listed(keep, size, batch, head, query, col):
    """Whether the table lists the block of each row and one column."""
    at = keep.table + batch * keep.table_b + head * keep.units // size.heads * keep.table_h
    return tl.load(at + query // keep.size * keep.columns + col // keep.size, mask=query < size.n, other=0) != 0


@triton.jit
def _written(keep, size, batch, query):
    """Which queries are text, where some are not."""
    at = keep.is_text + batch * keep.text_b + query
    return tl.load(at, mask=query < size.n, other=0) != 0


@triton.jit
def _span(keep, size, batch, head, query, RANGES: tl.constexpr):
    """The first key that some row may see, and the one after the last."""
    at = keep.ranges + batch * keep.b + _wide(head + 0 * query) * keep.h + query * (2 * RANGES)
    first, last = size.m, 0
    for r in tl.static_range(RANGES):
        lo = tl.load(at + 2 * r, mask=query < size.n, other=0)
        hi = tl.load(at + 2 * r + 1, mask=query < size.n, other=0)
        first = tl.minimum(first, tl.min(tl.where(lo < hi, lo, size.m)))
        last = tl.maximum(last, tl.max(hi))
    return first, last


@triton.jit
def _seers(keep, size, batch, head, group, first, BN: tl.constexpr, AT_ONCE: tl.constexpr, RANGES: tl.constexpr):
    """The first row that may see some of a block of keys, and the one after the last; rows are packed."""
    begin, end = size.n * group, 0
    for start in range(0, size.n * group, AT_ONCE):
        row = start + tl.arange(0, AT_ONCE)
        query = row // group
        at = keep.ranges + batch * keep.b + _wide(head + row % group) * keep.h + query * (2 * RANGES)
        for r in tl.static_range(RANGES):
            lo = tl.load(at + 2 * r, mask=query < size.n, other=0)
            hi = tl.load(at + 2 * r + 1, mask=query < size.n, other=0)
            sees = (lo < hi) & (lo < first + BN) & (hi > first)
            begin = tl.minimum(begin, tl.min(tl.where(sees, row, size.n * group)))
            end = tl.maximum(end, tl.max(tl.where(sees, row + 1, 0)))
    return begin, end


@triton.jit
def _wide(x):
    """A number that may be multiplied by a stride: a batch of long texts has more elements than 32 bits can count."""
    return x.to(tl.int64)


@triton.jit
def _whose(tiles):
    """Which tile a program has, and of what: all of them along one axis of the grid, since others end at 65,535."""
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def _read(x, batch, head, line, there, width, W: tl.constexpr):
    """Lines of a tensor `[b h n d]`, and zeros where nothing is there."""
    wide = tl.arange(0, W)
    at = x.at + batch * x.b + (_wide(head) * x.h + _wide(line) * x.n)[:, None] + wide[None, :]
    return tl.load(at, mask=there[:, None] & (wide < width)[None, :], other=0.0)


@triton.jit
def _product(a, b, size):
    """`a @ b` in float32; in TF32 nowhere."""
    if size.widened is not None:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(q, k, size, bias, batch, head, query, col):
    """A tile's scores, with what the model adds to them."""
    scores = _capped(_product(q, tl.trans(k), size) * size.scale, size)
    if bias is not None:
        scores += _added(bias, batch, head, query, col[None, :], (query < size.n)[:, None] & (col < size.m)[None, :])
    return scores


@triton.jit
def _added(bias, batch, head, query, col, there):
    """The bias of some pairs; heads and queries stand beside one another."""
    at = bias.at + batch * bias.b + (_wide(head) * bias.h + _wide(query) * bias.n)[:, None] + col
    return tl.load(at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _capped(scores, size):
    if size.softcap is not None:
        small = tl.exp(-2.0 * tl.abs(scores) / size.softcap)  # tanh, from an exponential that cannot overflow
        high = size.softcap * (1.0 - small) / (1.0 + small)
        scores = tl.where(scores < 0, -high, high)
    return scores


@triton.jit
def _share(level):
    """What a row's weights are multiplied with; nothing of a row that is not there."""
    return tl.where(level > float("-inf"), level, 0.0)


@triton.jit
def _pairs(keep, size, batch, head, query, col, at, RANGES: tl.constexpr):
    """Which pairs of a tile are computed."""
    kept = _kept(keep, size, batch, head, query, col, RANGES)
    if keep.table is not None:
        kept = kept & _listed(keep, size, batch, head, query, at)[:, None]
    return kept


@triton.jit
def _packed(size, BM: tl.constexpr):
    """A program's text, head of keys, and the query and head of each row: the heads of a group stand side by side."""
    tile, which = _whose(tl.cdiv(size.n * size.group, BM))
    shared_heads = size.heads // size.group
    batch, shared = _wide(which // shared_heads), which % shared_heads
    row = tile * BM + tl.arange(0, BM)
    return batch, shared, row // size.group, shared * size.group + row % size.group


@triton.jit
def _weighed(scores, level, size):
    """Weights of what is seen: by each row's log-sum-exp, or its share, where each is made of its score alone."""
    if size.sigmoid is not None:
        scores += size.sigmoid
        small = tl.exp(-tl.abs(scores))
        weights = _share(level)[:, None] * tl.where(scores < 0, small, 1.0) / (1.0 + small)
    elif size.relu is not None:
        weights = _share(level)[:, None] * tl.maximum(scores + size.relu, 0.0)
    else:
        weights = tl.exp(scores - level[:, None])
    return weights


@triton.jit
def _one_key(
    q, k_lines, one, size, keep, bias, batch, head, shared, query, BD: tl.constexpr, RANGES: tl.constexpr
):  # fmt: skip
    """Each row's score of one key, and whether it sees that; none where the key's column is -1."""
    col = one + tl.zeros([1], tl.int32)
    there = one >= 0
    kept = tl.max((_kept(keep, size, batch, head, query, col, RANGES)).to(tl.int32), 1) > 0
    if keep.table is not None:
        kept = kept & _listed(keep, size, batch, head, query, one)
    wide = tl.arange(0, BD)
    at = k_lines.at + batch * k_lines.b + _wide(shared) * k_lines.h + _wide(one) * k_lines.n + wide
    k = tl.load(at, mask=(wide < size.d) & there, other=0.0)
    score = _capped(tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * size.scale, size)
    if bias is not None:
        score += tl.sum(_added(bias, batch, head, query, col[None, :], ((query < size.n) & there)[:, None]), 1)
    return score, kept & there


@triton.jit
def attend_rows(
    q_lines, k_lines, v_lines, size, keep, bias, sink, first_at, carry, found, span,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Heads, the log-sum-exp of each row's scores, and what can be said of a row; each program has a span of keys."""
    batch, shared, query, head = _packed(size, BM)
    programs = tl.cdiv(size.n * size.group, BM) * (size.heads // size.group)  # of a text
    texts, split = tl.num_programs(0) // programs, tl.program_id(1)
    inside = query < size.n
    q = _read(q_lines, batch, head, query, inside, size.d, BD)

    top = tl.full([BM], float("-inf"), tl.float32)  # the highest score so far
    total = tl.zeros([BM], tl.float32)  # of exponentials of scores less the highest one
    drop = tl.zeros([BM], tl.float32)  # the same, each times how far below the highest its score lies
    place = tl.zeros([BM], tl.int32)
    sees = tl.zeros([BM], tl.int1)  # told by the mask alone: a row of minus infinities is no number, and not blind
    out = tl.zeros([BM, BE], tl.float32)
    carried = tl.zeros([BM, BC], tl.float32)

    start, stop = _span(keep, size, batch, head, query, RANGES)
    start, stop = tl.maximum(start, split * span), tl.minimum(stop, (split + 1) * span)
    for at in range(start // BN * BN, stop, BN):
        col = at + tl.arange(0, BN)
        kept = _pairs(keep, size, batch, head, query, col, at, RANGES)
        seen = tl.max(kept.to(tl.int32), 0) > 0  # what no row may see is not read: it may hold anything
        if (keep.table is None and RANGES == 1) or tl.max(seen.to(tl.int32)) > 0:
            same = shared + 0 * col
            k = _read(k_lines, batch, same, col, seen, size.d, BD)
            scores = _scores(q, k, size, bias, batch, head, query, col)
            scores = tl.where(kept, scores, float("-inf"))
            sees = sees | (tl.max(kept.to(tl.int32), 1) > 0)
            best = tl.max(scores, 1)
            if found.place is not None:
                place = tl.where(best > top, at + tl.argmax(scores, 1), place)
            higher = tl.maximum(top, best)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            fall = tl.where(top == float("-inf"), 0.0, top - base)
            shrink = tl.where(top == float("-inf"), 0.0, tl.exp(fall))
            part = tl.exp(scores - base[:, None])
            if found.entropy is not None:
                below = tl.where(kept, scores - base[:, None], 0.0)
                drop = shrink * (drop + total * fall) + tl.sum(part * below, 1)
            total = shrink * total + tl.sum(part, 1)
            top = higher
            v = _read(v_lines, batch, same, col, seen, size.e, BE)
            out = out * shrink[:, None] + _product(part.to(v.dtype), v, size)
            if carry is not None:
                more = _read(carry, batch, 0 * col, col, seen, size.c, BC)
                carried = carried * shrink[:, None] + _product(part, more, size)

    base = tl.where(top == float("-inf"), 0.0, top)
    whole = total
    if sink is not None:  # a logit without key or value, counted with the first span
        logit = tl.load(sink + head, mask=inside & (split == 0), other=float("-inf"))
        higher = tl.maximum(base, logit)
        fall = tl.exp(base - higher)
        total, drop = total * fall, fall * (drop + total * (base - higher))
        out, carried = out * fall[:, None], carried * fall[:, None]
        base, whole = higher, total + tl.exp(logit - higher)
    total = tl.where(sees & (top == float("-inf")), float("nan"), total)
    empty = (total == 0.0) & (whole == 0.0)
    whole = tl.where(empty, 1.0, tl.where(total == total, whole, total))
    share = tl.where(sees, 1.0 / whole, 0.0)
    line = ((split * texts + batch) * size.heads + head) * size.n + query
    tl.store(found.lse + line, tl.where(empty, float("-inf"), base + tl.log(whole)), mask=inside)
    wide = tl.arange(0, BE)
    there = inside[:, None] & (wide < size.e)[None, :]
    at = ((split * texts + batch) * size.n + query) * size.heads + head  # heads side by side, as models go on
    tl.store(found.out + at[:, None] * size.e + wide[None, :], out * share[:, None], mask=there)
    if found.entropy is not None:
        entropy = tl.where(~sees, 0.0, (total * tl.log(whole) - drop) * share)
        tl.store(found.entropy + line, tl.maximum(entropy, 0.0), mask=inside)
    if found.peak is not None:
        tl.store(found.peak + line, tl.where(sees, tl.exp(top - base) * share, 0.0), mask=inside)
    if found.place is not None:
        tl.store(found.place + line, place, mask=inside)
    if found.first is not None:
        one = tl.load(first_at + batch)
        score, kept = _one_key(q, k_lines, one, size, keep, bias, batch, head, shared, query, BD=BD, RANGES=RANGES)
        tl.store(found.first + line, tl.where(kept, tl.exp(score - base) * share, 0.0), mask=inside)
    if found.carried is not None:
        wide = tl.arange(0, BC)
        there = inside[:, None] & (wide < size.c)[None, :]
        tl.store(found.carried + line[:, None] * size.c + wide[None, :], carried * share[:, None], mask=there)


@triton.jit
def _weights(
    q_lines, k_lines, lse, size, keep, bias, batch, head, query, first,
    BN: tl.constexpr, BD: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """A tile's weights, from its rows' log-sum-exp or share; none of queries that are not text."""
    col = first + tl.arange(0, BN)
    kept = _pairs(keep, size, batch, head, query, col, first, RANGES)
    if keep.is_text is not None:
        kept = kept & _written(keep, size, batch, query)[:, None]
    weights = tl.zeros([query.shape[0], BN], tl.float32)
    seen = tl.max(kept.to(tl.int32), 0) > 0
    if (keep.table is None and RANGES == 1) or tl.max(seen.to(tl.int32)) > 0:
        q = _read(q_lines, batch, head + 0 * query, query, query < size.n, size.d, BD)
        k = _read(k_lines, batch, head // size.group + 0 * col, col, seen, size.d, BD)
        level = tl.load(lse + (batch * size.heads + head) * size.n + query, mask=query < size.n, other=0.0)
        sees = kept & (level > float("-inf"))[:, None]
        scores = _scores(q, k, size, bias, batch, head + 0 * query, query, col)
        weights = tl.where(sees, _weighed(scores, level, size), 0.0)
    return weights


@triton.jit
def add_columns(
    q_lines, k_lines, lse, size, keep, bias, received,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """What each key receives: a program has a block of keys and goes through all queries, in their order."""
    tile, which = _whose(tl.cdiv(size.m, BN))
    batch, head = _wide(which // size.heads), which % size.heads
    first = tile * BN
    summed = tl.zeros([BN], tl.float32)
    begin, end = _seers(keep, size, batch, head, 1, first, BN, SCAN, RANGES)
    for start in range(begin // BM * BM, end, BM):
        query = start + tl.arange(0, BM)
        weights = _weights(q_lines, k_lines, lse, size, keep, bias, batch, head, query, first, BN, BD, RANGES)
        summed += tl.sum(weights, 0)
    col = first + tl.arange(0, BN)
    tl.store(received + _wide(which) * size.m + col, summed, mask=col < size.m)


@triton.jit
def add_diagonals(
    q_lines, k_lines, lse, size, keep, bias, distance, offset, reach,
    B: tl.constexpr, BD: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """The weight at each distance: a program has a diagonal of tiles, in all of which a place means one distance."""
    wide = tl.cdiv(size.m, B)
    tile, which = _whose(tl.cdiv(size.n, B) + wide - 1)
    batch, head = _wide(which // size.heads), which % size.heads
    lag = tile - (wide - 1)
    summed = tl.zeros([B, B], tl.float32)
    for i in range(tl.maximum(lag, 0), tl.minimum(tl.cdiv(size.n, B), wide + lag)):
        query = i * B + tl.arange(0, B)
        summed += _weights(q_lines, k_lines, lse, size, keep, bias, batch, head, query, (i - lag) * B, B, BD, RANGES)
    place = tl.arange(0, B)
    far = lag * B + offset + place[:, None] - place[None, :]
    tl.atomic_add(distance + _wide(which) * reach + far, summed, mask=(far >= 0) & (far < reach))
