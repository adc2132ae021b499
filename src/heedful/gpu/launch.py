"""Calls the kernels: block sizes, a split of long caches among programs, and the order of passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from heedful.gpu import backward, interpreted, kernels
from heedful.gpu.backward import Back
from heedful.gpu.kernels import Found, Keep, Lines, Sizes

SPAN = 1024  # keys to a program where a call has too few rows to fill a GPU
FEW = 64  # programs below which keys are split


@dataclass(frozen=True)
class Tiles:
    """How many rows and keys a program has at a time."""

    rows: int
    keys: int


def tiles(width: int, rows: int) -> Tiles:
    """What fits into the shared memory of any card since Volta, in float32 too: untuned, and safe."""
    keys = 64 if width <= 64 else 32 if width <= 128 else 16
    return Tiles(max(16, min(64, keys * 2, triton.next_power_of_2(rows))), keys)


@dataclass(frozen=True, eq=False)
class Problem:
    """A call as the kernels take it; `is_text` and `table` are bytes, `first_at [b]` a column or -1."""

    q: Tensor
    k: Tensor
    v: Tensor
    ranges: Tensor  # [b|1 h|1 n r 2], int32
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None  # [b|1 h|1 n|1 m], added to scores
    sink: Tensor | None = None  # [h]
    table: Tensor | None = None  # [b|1 units rows columns]
    block: int = 0
    is_text: Tensor | None = None  # [b|1 n]
    carry: Tensor | None = None  # [b m c], float32
    first_at: Tensor | None = None
    entropy: bool = False
    place: bool = False
    received: bool = False
    offset: int = 0  # of distances: that of the first query and the first key, less the least one
    reach: int = 0  # how many distances there are; 0 where none are asked for


@dataclass(frozen=True, eq=False)
class Answer:
    """Heads `[b h n e]`, the log-sum-exp of each row `[b h n]`, and what was asked for beside them."""

    out: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    peak: Tensor | None = None
    place: Tensor | None = None
    first: Tensor | None = None
    carried: Tensor | None = None
    received: Tensor | None = None
    distance: Tensor | None = None


def attend(p: Problem) -> Answer:
    """One call; the second pass over keys, and the third, are made where columns or distances are asked for."""
    size, keep = _sizes(p), _keep(p)
    q, k, bias = _lines(p.q), _lines(p.k), None if p.bias is None else _shared(p.bias)
    fit = tiles(max(size.d, size.e), size.n * size.group)
    widths = {"BD": _power(size.d), "RANGES": p.ranges.shape[3]}
    answer = _rows(p, q, k, size, keep, bias, fit, widths)
    texts = p.q.shape[0] * size.heads
    if p.received:
        received = p.q.new_empty(p.q.shape[0], size.heads, size.m, dtype=torch.float32)
        grid = (triton.cdiv(size.m, fit.keys), texts)
        _call(
            kernels.add_columns, grid, q, k, answer.lse, size, keep, bias, received, BM=fit.rows, BN=fit.keys, **widths
        )  # fmt: skip
        answer = _with(answer, received=received)
    if p.reach:
        distance = p.q.new_zeros(p.q.shape[0], size.heads, p.reach, dtype=torch.float32)
        side = fit.keys
        grid = (triton.cdiv(size.n, side) + triton.cdiv(size.m, side) - 1, texts)
        _call(
            kernels.add_diagonals, grid, q, k, answer.lse, size, keep, bias, distance, p.offset, p.reach, B=side,
            **widths,
        )  # fmt: skip
        answer = _with(answer, distance=distance)
    return answer


def pull(p: Problem, out: Tensor, lse: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What queries, keys and values are given, in float32, when the output is given that."""
    size, keep, bias = _sizes(p), _keep(p), None if p.bias is None else _shared(p.bias)
    back = Back(lse.contiguous(), (given.float() * out).sum(-1).contiguous())
    lines = [_lines(x) for x in (p.q, p.k, p.v, given.to(p.v.dtype))]
    q, k, v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (p.q, p.k, p.v))
    fit = tiles(2 * max(size.d, size.e), size.n * size.group)
    widths = {"BM": fit.rows, "BN": fit.keys, "BD": _power(size.d), "BE": _power(size.e), "RANGES": p.ranges.shape[3]}
    groups = p.q.shape[0] * size.heads // size.group
    rows, columns = triton.cdiv(size.n * size.group, fit.rows), triton.cdiv(size.m, fit.keys)
    _call(backward.pull_queries, (rows, groups), *lines, size, keep, bias, back, q, **widths)
    _call(backward.pull_keys, (columns, groups), *lines, size, keep, bias, back, k, v, **widths)
    return q, k, v


def _rows(
    p: Problem, q: Lines, k: Lines, size: Sizes, keep: Keep, bias: Lines | None, fit: Tiles, widths: dict[str, int]
) -> Answer:
    b, groups = p.q.shape[0], size.heads // size.group
    blocks = triton.cdiv(size.n * size.group, fit.rows)
    plain = not (p.entropy or p.place or p.first_at is not None or p.carry is not None)
    span = SPAN if plain and blocks * b * groups < FEW else max(1, size.m)
    splits = triton.cdiv(max(1, size.m), span)

    def room(wanted: bool, *last: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return p.q.new_empty(splits, b, size.heads, size.n, *last, dtype=dtype) if wanted else None

    out = p.q.new_empty(splits, b, size.n, size.heads, size.e, dtype=torch.float32)
    lse = p.q.new_empty(splits, b, size.heads, size.n, dtype=torch.float32)
    carry = None if p.carry is None else Lines(p.carry, p.carry.stride(0), 0, p.carry.stride(1))
    found = Found(
        out, lse, room(p.entropy), room(p.place), room(p.place, dtype=torch.int32), room(p.first_at is not None),
        room(p.carry is not None, size.c),
    )  # fmt: skip
    _call(
        kernels.attend_rows, (blocks, b * groups, splits), q, k, _lines(p.v), size, keep, bias, p.sink, p.first_at,
        carry, found, span, BM=fit.rows, BN=fit.keys, BE=_power(size.e), BC=_power(size.c), **widths,
    )  # fmt: skip
    if splits > 1:
        whole = torch.logsumexp(lse, 0)
        share = (lse - whole).exp().nan_to_num(0.0)  # a row that sees nothing has no share in anything
        return Answer((out * share.transpose(2, 3)[..., None]).sum(0).transpose(1, 2), whole)
    alone = {name: x[0] for name, x in zip(Found._fields, found, strict=True) if x is not None}
    alone["out"] = alone["out"].transpose(1, 2)
    if p.carry is not None:
        alone["carried"] = alone["carried"].mean(1)
    return Answer(**alone)


def _with(answer: Answer, **more: Tensor) -> Answer:
    return Answer(**{**answer.__dict__, **more})


def _call(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: int) -> None:
    launched: Callable[..., object] = kernel[grid]
    launched(*args, **sizes)


def _power(width: int) -> int:
    """What a matrix product takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def _lines(x: Tensor) -> Lines:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Lines(x, *x.stride()[:3])


def _shared(x: Tensor) -> Lines:
    """Lines that stand for all texts, heads or queries where there is one."""
    lines = _lines(x)
    return Lines(lines.at, *(0 if size == 1 else gap for gap, size in zip(lines[1:], x.shape[:3], strict=True)))


def _strides(x: Tensor) -> tuple[int, int]:
    """Of text and head, 0 where one stands for all."""
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in (0, 1))  # type: ignore[return-value]


def _sizes(p: Problem) -> Sizes:
    h, c = p.q.shape[1], 0 if p.carry is None else p.carry.shape[-1]
    widened = 1 if interpreted() and p.q.dtype == torch.bfloat16 else None
    return Sizes(
        h, h // p.k.shape[1], p.q.shape[2], p.k.shape[2], p.q.shape[3], p.v.shape[3], c, p.scale, p.softcap, widened
    )  # fmt: skip


def _keep(p: Problem) -> Keep:
    table, text = p.table, p.is_text
    named = (0, 0, 1, 1) if table is None else (*_strides(table), table.shape[1], table.shape[3])
    text_b = 0 if text is None or text.shape[0] == 1 else text.stride(0)
    return Keep(p.ranges, *_strides(p.ranges), table, *named, p.block or 1, text, text_b)
