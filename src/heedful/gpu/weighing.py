"""Attention whose weights are each made of their own score, as a Triton kernel: no row waits for a sum.

Tiles, masks and what a row is asked for are those of `attend_rows`. In the place of a log-sum-exp stands each row's
share: what a sigmoid, or a rectified score, is multiplied with.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heedful.gpu.kernels import _one_key, _packed, _pairs, _product, _read, _scores, _span, _weighed


@triton.jit
def weigh_rows(
    q_lines, k_lines, v_lines, size, keep, bias, first_at, carry, found, span,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, RANGES: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """Heads, each row's share, and what can be said of a row; with MEAN the share is one over the keys that it sees."""
    batch, shared, query, head = _packed(size, BM)
    programs = tl.cdiv(size.n * size.group, BM) * (size.heads // size.group)  # of a text
    texts, split = tl.num_programs(0) // programs, tl.program_id(1)
    inside = query < size.n
    q = _read(q_lines, batch, head, query, inside, size.d, BD)

    whole = tl.full([BM], 1.0, tl.float32)  # the share of a row that is not divided
    top = tl.zeros([BM], tl.float32)  # the highest weight so far
    place = tl.zeros([BM], tl.int32)
    many = tl.zeros([BM], tl.int32)  # keys that are seen
    total = tl.zeros([BM], tl.float32)
    spread = tl.zeros([BM], tl.float32)  # of weights, each times its logarithm
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
            weights = _weighed(_scores(q, k, size, bias, batch, head, query, col), whole, size)
            weights = tl.where(kept, weights, 0.0)
            if found.place is not None:
                best = tl.max(weights, 1)
                place = tl.where(best > top, at + tl.argmax(weights, 1), place)
                top = tl.maximum(top, best)
            if found.entropy is not None:
                spread += tl.sum(weights * tl.log(tl.where(weights > 0.0, weights, 1.0)), 1)
                total += tl.sum(weights, 1)
            if MEAN:
                many += tl.sum(kept.to(tl.int32), 1)
            v = _read(v_lines, batch, same, col, seen, size.e, BE)
            out += _product(weights.to(v.dtype), v, size)
            if carry is not None:
                carried += _product(weights, _read(carry, batch, 0 * col, col, seen, size.c, BC), size)

    share = whole
    if MEAN:
        share = 1.0 / tl.maximum(many, 1).to(tl.float32)
    line = ((split * texts + batch) * size.heads + head) * size.n + query
    tl.store(found.lse + line, share, mask=inside)
    wide = tl.arange(0, BE)
    there = inside[:, None] & (wide < size.e)[None, :]
    at = ((split * texts + batch) * size.n + query) * size.heads + head  # heads side by side, as models go on
    tl.store(found.out + at[:, None] * size.e + wide[None, :], out * share[:, None], mask=there)
    if found.entropy is not None:
        tl.store(found.entropy + line, -share * (spread + tl.log(share) * total), mask=inside)
    if found.peak is not None:
        tl.store(found.peak + line, top * share, mask=inside)
    if found.place is not None:
        tl.store(found.place + line, place, mask=inside)
    if found.first is not None:
        one = tl.load(first_at + batch)
        score, sees = _one_key(q, k_lines, one, size, keep, bias, batch, head, shared, query, BD=BD, RANGES=RANGES)
        weight = tl.sum(_weighed(score[:, None], share, size), 1)
        tl.store(found.first + line, tl.where(sees, weight, 0.0), mask=inside)
    if found.carried is not None:
        wide = tl.arange(0, BC)
        there = inside[:, None] & (wide < size.c)[None, :]
        tl.store(found.carried + line[:, None] * size.c + wide[None, :], carried * share[:, None], mask=there)
