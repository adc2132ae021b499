"""The way back of attention as Triton kernels: weights are computed again, tile by tile, from each row's log-sum-exp.

With `p` a weight, `g` what a row's output is given on the way back, `v` a value and `o` the output, a score is given
`p (g v - g o)`, a value `p g`; queries and keys are given what their scores are, times the keys and queries that they
met. One kernel goes through the keys of each row, for queries; another through the rows of each key. A bias is given
what capped scores are: a third has a tile of it, and goes through all texts, heads and queries that it stands for.

Where what keys receive is given something too, `c` for a key, a weight is given `g v + c`, and `g o` becomes `g o` plus
the row's sum of `p c`: a pass of its own adds that up, before all others. Where each weight is made of its own score,
nothing is taken off: a score is given what its weight is, times the slope there.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from heedful.gpu.kernels import (
    SCAN,
    Lines,
    _added,
    _capped,
    _packed,
    _pairs,
    _product,
    _read,
    _seers,
    _share,
    _span,
    _weighed,
    _whose,
    _wide,
    _written,
)


class Back(NamedTuple):
    """What the way back begins with: `lse` and `met [b h n]`, the latter what weights are given, in each row's mean.

    Without columns that is the output times what it is given. `columns [b h 1 m]` is what received sums are given.
    """

    lse: Tensor
    met: Tensor
    columns: Lines | None


@triton.jit
def _again(q, k, level, kept, size, bias, batch, head, query, col):
    """A tile's weights, its capped scores, and the pairs that have a weight."""
    capped = _capped(_product(q, tl.trans(k), size) * size.scale, size)
    scores = capped
    if bias is not None:
        scores += _added(bias, batch, head, query, col[None, :], (query < size.n)[:, None] & (col < size.m)[None, :])
    kept = kept & (level > float("-inf"))[:, None]
    return tl.where(kept, _weighed(scores, level, size), 0.0), capped, kept


@triton.jit
def _charged(back, keep, size, batch, head, query, col):
    """What a tile's weights are given since keys receive them: of text alone, since no other is counted."""
    there = query < size.n
    if keep.is_text is not None:
        there = there & _written(keep, size, batch, query)
    return _added(back.columns, batch, head, 0 * query, col[None, :], there[:, None] & (col < size.m)[None, :])


@triton.jit
def _given(q, k, v, pull, level, met, kept, size, keep, bias, back, batch, head, query, col):
    """A tile's weights, and what its scores are given after they are capped, and before they are capped and scaled."""
    weights, capped, kept = _again(q, k, level, kept, size, bias, batch, head, query, col)
    pulled = _product(pull, tl.trans(v), size)
    if back.columns is not None:
        pulled += _charged(back, keep, size, batch, head, query, col)
    if size.sigmoid is not None:
        added = weights * (1.0 - weights / level[:, None]) * pulled
    elif size.relu is not None:
        added = tl.where(weights > 0.0, _share(level)[:, None] * pulled, 0.0)
    else:
        added = weights * (pulled - met[:, None])
    added = tl.where(kept, added, 0.0)  # what is masked may hold anything
    given = added
    if size.softcap is not None:
        share = tl.where(kept, capped / size.softcap, 0.0)
        given = added * (1.0 - share * share)
    return weights, added, given


@triton.jit
def meet_columns(
    q_lines, k_lines, size, keep, bias, back,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """Adds to `met` what each row's weights are given by way of the columns; rows are packed as in `attend_rows`."""
    batch, shared, query, head = _packed(size, BM)
    inside = query < size.n
    q = _read(q_lines, batch, head, query, inside, size.d, BD)
    line = (batch * size.heads + head) * size.n + query
    level = tl.load(back.lse + line, mask=inside, other=float("-inf"))
    met = tl.load(back.met + line, mask=inside, other=0.0)
    start, stop = _span(keep, size, batch, head, query, RANGES)
    for at in range(start // BN * BN, stop, BN):
        col = at + tl.arange(0, BN)
        kept = _pairs(keep, size, batch, head, query, col, at, RANGES)
        seen = tl.max(kept.to(tl.int32), 0) > 0
        if (keep.table is None and RANGES == 1) or tl.max(seen.to(tl.int32)) > 0:
            k = _read(k_lines, batch, shared + 0 * col, col, seen, size.d, BD)
            weights, _, _ = _again(q, k, level, kept, size, bias, batch, head, query, col)
            met += tl.sum(weights * _charged(back, keep, size, batch, head, query, col), 1)
    tl.store(back.met + line, met, mask=inside)


@triton.jit
def pull_queries(
    q_lines, k_lines, v_lines, pull_lines, size, keep, bias, back, made,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """What queries are given: a program has rows, packed as in `attend_rows`, and goes through their keys."""
    batch, shared, query, head = _packed(size, BM)
    inside = query < size.n
    q = _read(q_lines, batch, head, query, inside, size.d, BD)
    pull = _read(pull_lines, batch, head, query, inside, size.e, BE)
    line = (batch * size.heads + head) * size.n + query
    level = tl.load(back.lse + line, mask=inside, other=float("-inf"))
    met = tl.load(back.met + line, mask=inside, other=0.0)
    summed = tl.zeros([BM, BD], tl.float32)
    start, stop = _span(keep, size, batch, head, query, RANGES)
    for at in range(start // BN * BN, stop, BN):
        col = at + tl.arange(0, BN)
        kept = _pairs(keep, size, batch, head, query, col, at, RANGES)
        seen = tl.max(kept.to(tl.int32), 0) > 0
        if (keep.table is None and RANGES == 1) or tl.max(seen.to(tl.int32)) > 0:
            same = shared + 0 * col
            k = _read(k_lines, batch, same, col, seen, size.d, BD)
            v = _read(v_lines, batch, same, col, seen, size.e, BE)
            _, _, given = _given(q, k, v, pull, level, met, kept, size, keep, bias, back, batch, head, query, col)
            summed += _product(given.to(k.dtype), k, size)
    wide = tl.arange(0, BD)
    there = inside[:, None] & (wide < size.d)[None, :]
    tl.store(made + line[:, None] * size.d + wide[None, :], summed * size.scale, mask=there)


@triton.jit
def pull_keys(
    q_lines, k_lines, v_lines, pull_lines, size, keep, bias, back, made_k, made_v,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, RANGES: tl.constexpr,
):  # fmt: skip
    """What keys and values are given: a program has a block of keys and goes through the rows of all its heads."""
    shared_heads = size.heads // size.group
    tile, which = _whose(tl.cdiv(size.m, BN))
    batch, shared = _wide(which // shared_heads), which % shared_heads
    first = tile * BN
    col = first + tl.arange(0, BN)
    inside = col < size.m
    same = shared + 0 * col
    k = _read(k_lines, batch, same, col, inside, size.d, BD)
    v = _read(v_lines, batch, same, col, inside, size.e, BE)
    keys = tl.zeros([BN, BD], tl.float32)
    values = tl.zeros([BN, BE], tl.float32)
    begin, end = _seers(keep, size, batch, shared * size.group, size.group, first, BN, SCAN, RANGES)
    for start in range(begin // BM * BM, end, BM):
        row = start + tl.arange(0, BM)
        query, head = row // size.group, shared * size.group + row % size.group
        kept = _pairs(keep, size, batch, head, query, col, first, RANGES)
        sees = tl.max(kept.to(tl.int32), 1) > 0
        if (keep.table is None and RANGES == 1) or tl.max(sees.to(tl.int32)) > 0:
            q = _read(q_lines, batch, head, query, sees, size.d, BD)
            pull = _read(pull_lines, batch, head, query, sees, size.e, BE)
            line = (batch * size.heads + head) * size.n + query
            level = tl.load(back.lse + line, mask=sees, other=float("-inf"))
            met = tl.load(back.met + line, mask=sees, other=0.0)
            weights, _, given = _given(q, k, v, pull, level, met, kept, size, keep, bias, back, batch, head, query, col)
            keys += _product(tl.trans(given).to(q.dtype), q, size)
            values += _product(tl.trans(weights).to(pull.dtype), pull, size)
    line = (batch * shared_heads + shared) * size.m + col
    wide, far = tl.arange(0, BD), tl.arange(0, BE)
    at = made_k + line[:, None] * size.d + wide[None, :]
    tl.store(at, keys * size.scale, mask=inside[:, None] & (wide < size.d)[None, :])
    at = made_v + line[:, None] * size.e + far[None, :]
    tl.store(at, values, mask=inside[:, None] & (far < size.e)[None, :])


class Apart(NamedTuple):
    """How many texts, heads and queries a bias tells apart: 1, or all."""

    texts: int
    heads: int
    queries: int


@triton.jit
def pull_bias(
    q_lines, k_lines, v_lines, pull_lines, size, keep, bias, back, apart, texts, made,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, RANGES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """What a bias is given, `[b|1 h|1 n|1 m]`; with ROWS it tells queries apart."""
    tile, which = _whose(tl.cdiv(size.m, BN))
    text, mine = which // apart.heads, which % apart.heads
    first = tile * BN
    col = first + tl.arange(0, BN)
    inside = col < size.m
    begin, end = tl.program_id(1) * BM, size.n
    if ROWS:
        end = begin + BM
    summed = tl.zeros([BM, BN], tl.float32)
    for i in range(texts // apart.texts):
        batch = _wide(text + i)
        for j in range(size.heads // apart.heads):
            head = mine + j
            for start in range(begin, end, BM):
                query = start + tl.arange(0, BM)
                heads = head + 0 * query
                kept = _pairs(keep, size, batch, heads, query, col, first, RANGES)
                sees, seen = tl.max(kept.to(tl.int32), 1) > 0, tl.max(kept.to(tl.int32), 0) > 0
                if tl.max(sees.to(tl.int32)) > 0:
                    shared = head // size.group + 0 * col
                    q = _read(q_lines, batch, heads, query, sees, size.d, BD)
                    pull = _read(pull_lines, batch, heads, query, sees, size.e, BE)
                    k = _read(k_lines, batch, shared, col, seen, size.d, BD)
                    v = _read(v_lines, batch, shared, col, seen, size.e, BE)
                    line = (batch * size.heads + head) * size.n + query
                    level = tl.load(back.lse + line, mask=sees, other=float("-inf"))
                    met = tl.load(back.met + line, mask=sees, other=0.0)
                    _, added, _ = _given(
                        q, k, v, pull, level, met, kept, size, keep, bias, back, batch, heads, query, col
                    )
                    summed += added
    line = _wide(which) * apart.queries
    if ROWS:
        query = begin + tl.arange(0, BM)
        at = made + (line + query)[:, None] * size.m + col[None, :]
        tl.store(at, summed, mask=(query < size.n)[:, None] & inside[None, :])
    else:
        tl.store(made + line * size.m + col, tl.sum(summed, 0), mask=inside)
