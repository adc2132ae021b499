"""Calls the kernels: a split of long caches among programs, and the order of passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from heedful.gpu import backward, blocks, decode, interpreted, kernels, weighing
from heedful.gpu.backward import Apart, Back
from heedful.gpu.blocks import BACK, ROWS, STEP, Tiles
from heedful.gpu.decode import Made, Seen
from heedful.gpu.kernels import Found, Keep, Lines, Sizes

T = TypeVar("T")


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
    form: str = ""  # "sigmoid" or "relu" where each weight is that of its score and `shift`; else a softmax
    shift: float = 0.0
    mean: bool = False  # and divided by the number of keys that its query sees

    @property
    def parts(self) -> tuple[Any, ...]:
        """What operators take, in this order."""
        return tuple(getattr(self, x.name) for x in fields(self))


@dataclass(frozen=True, eq=False)
class Step:
    """One query of each head as the kernel takes it; `ends`, `places` and `base` are as in `decode.Seen`."""

    q: Tensor  # [b h 1 d]
    k: Tensor  # [b g m d], or [t d] of all heads, one after another, where there is a base
    v: Tensor
    ends: Tensor
    scale: float
    keys: int  # columns
    longest: int  # the most keys that a unit sees
    softcap: float | None = None
    bias: Tensor | None = None
    sink: Tensor | None = None
    places: Tensor | None = None
    base: Tensor | None = None
    weights: bool = False
    form: str = ""  # as in a Problem, with what follows
    shift: float = 0.0
    mean: bool = False

    @property
    def parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, x.name) for x in fields(self))


@dataclass(frozen=True, eq=False)
class Answer:
    """Heads `[b h n e]`, each row's log-sum-exp or share `[b h n]`, and what was asked for beside them."""

    out: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    peak: Tensor | None = None
    place: Tensor | None = None
    first: Tensor | None = None
    carried: Tensor | None = None
    received: Tensor | None = None
    distance: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Pulled:
    """What a way back starts from: what a call gave, and what that is given."""

    out: Tensor
    lse: Tensor
    heads: Tensor  # given to `out`
    columns: Tensor | None = None  # [b h m], given to what keys received


def _fitting(run: Callable[[Tiles], T], kind: str, width: int, rows: int, q: Tensor, block: int = 0) -> T:
    """With the sizes that were measured, or safe ones where a call asks for more beside them than the card holds."""
    fit = blocks.tiles(kind, width, rows, q, block)
    try:
        return run(fit)
    except OutOfResources:
        if not fit.tuned:
            raise
        return run(blocks.tiles(kind, width, rows, q, block, measured=False))


def attend(p: Problem) -> Answer:
    """One call; the second pass over keys, and the third, are made where columns or distances are asked for."""
    size = _sizes(p)
    return _fitting(partial(_attend, p, size), ROWS, max(size.d, size.e), size.n * size.group, p.q, p.block)


def _attend(p: Problem, size: Sizes, fit: Tiles) -> Answer:
    q, k, keep, bias = _lines(p.q), _lines(p.k), _keep(p), None if p.bias is None else _shared(p.bias)
    widths = {"BD": _power(size.d), "RANGES": p.ranges.shape[3], **fit.how}
    answer = _rows(p, q, k, size, keep, bias, fit, widths)
    texts = p.q.shape[0] * size.heads
    if p.received:
        received = p.q.new_empty(p.q.shape[0], size.heads, size.m, dtype=torch.float32)
        grid = (triton.cdiv(size.m, fit.keys) * texts,)
        _call(
            kernels.add_columns, grid, q, k, answer.lse, size, keep, bias, received, BM=fit.rows, BN=fit.keys, **widths
        )  # fmt: skip
        answer = _with(answer, received=received)
    if p.reach:
        distance = p.q.new_zeros(p.q.shape[0], size.heads, p.reach, dtype=torch.float32)
        side = fit.keys
        grid = ((triton.cdiv(size.n, side) + triton.cdiv(size.m, side) - 1) * texts,)
        _call(
            kernels.add_diagonals, grid, q, k, answer.lse, size, keep, bias, distance, p.offset, p.reach, B=side,
            **widths,
        )  # fmt: skip
        answer = _with(answer, distance=distance)
    return answer


def step(p: Step) -> tuple[Tensor, Tensor | None]:
    """Heads `[b h 1 e]` of one query each, and their weights `[b h m]` where these are asked for."""
    return _fitting(
        partial(_step, p), STEP, max(p.q.shape[-1], p.v.shape[-1]), p.q.shape[1] // p.ends.shape[1], p.q
    )  # fmt: skip


def _step(p: Step, fit: Tiles) -> tuple[Tensor, Tensor | None]:
    b, h, _, d = p.q.shape
    flat, units, e = p.base is not None, p.ends.shape[1], p.v.shape[-1]
    g = p.k.shape[1] if p.base is None else p.base.shape[1]
    k, v = (Lines(x, 0, 0, x.stride(0)) if flat else _lines(x) for x in (_close(p.k), _close(p.v)))
    size = Sizes(h, h // g, 1, p.keys, d, e, 0, p.scale, p.softcap, _widened(p.q), *_forms(p))
    span = blocks.span(p.longest, b * units)
    splits = triton.cdiv(max(1, p.longest), span)
    out, lse = (p.q.new_empty(splits, b, h, *last, dtype=torch.float32) for last in ((e,), ()))
    none = 0.0 if p.form else float("-inf")
    scores = torch.full((b, h, p.keys), none, dtype=torch.float32, device=p.q.device) if p.weights else None
    seen = Seen(p.ends, units, p.places, 0 if p.places is None else p.places.shape[2], p.base)
    bias = None if p.bias is None else _shared(p.bias)
    grid = (triton.cdiv(h // units, fit.rows) * b * units, splits)
    _call(
        decode.attend_step, grid, _lines(p.q), k, v, size, seen, bias, p.sink, Made(out, lse, scores),
        span, BM=fit.rows, BN=fit.keys, BD=_power(d), BE=_power(e), MEAN=p.mean, **fit.how,
    )  # fmt: skip
    if p.form:
        return out.sum(0)[..., None, :], scores
    heads, whole = _merged(out[..., None, :], lse[..., None])
    if scores is None:
        return heads, None
    level = whole.masked_fill(whole == float("-inf"), 0.0)  # of heads that see nothing
    return heads, (scores - level).exp()


def _merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What spans of keys come to together, `out [splits b h n e]` and `lse [splits b h n]`."""
    if len(out) == 1:
        return out[0], lse[0]
    whole = torch.logsumexp(lse, 0)
    share = (lse - whole).exp().nan_to_num(0.0)  # a row that sees nothing has no share in anything
    return (out * share[..., None]).sum(0), whole


def pull(
    p: Problem, of: Pulled, to_bias: bool = False, to_sink: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """What queries, keys, values, bias and sink are given, in float32, when what a call gave is given that."""
    size = _sizes(p)
    run = partial(_pull, p, size, of, to_bias)
    q, k, v, bias, back = _fitting(run, BACK, max(size.d, size.e), size.n * size.group, p.q, p.block)
    return q, k, v, bias, _pulled_sink(p.sink, back) if to_sink and p.sink is not None else None


def _pull(
    p: Problem, size: Sizes, of: Pulled, to_bias: bool, fit: Tiles
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Back]:
    keep, bias = _keep(p), None if p.bias is None else _shared(p.bias)
    given = None if of.columns is None else _shared(of.columns.float()[:, :, None])
    met = of.lse.new_zeros(()).expand(of.lse.shape) if p.form else (of.heads.float() * of.out).sum(-1)
    back = Back(of.lse.contiguous(), met.contiguous(), given)
    lines = [_lines(x) for x in (p.q, p.k, p.v, of.heads.to(p.v.dtype))]
    q, k, v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (p.q, p.k, p.v))
    widths = {"BM": fit.rows, "BN": fit.keys, "BD": _power(size.d), "BE": _power(size.e), "RANGES": p.ranges.shape[3]}
    widths |= fit.how
    groups = p.q.shape[0] * size.heads // size.group
    rows, columns = triton.cdiv(size.n * size.group, fit.rows), triton.cdiv(size.m, fit.keys)
    if back.columns is not None and not p.form:
        alone = {name: x for name, x in widths.items() if name != "BE"}
        _call(backward.meet_columns, (rows * groups,), *lines[:2], size, keep, bias, back, **alone)
    _call(backward.pull_queries, (rows * groups,), *lines, size, keep, bias, back, q, **widths)
    _call(backward.pull_keys, (columns * groups,), *lines, size, keep, bias, back, k, v, **widths)
    made = _pulled_bias(p, p.bias, lines, (size, keep, back), fit, widths) if to_bias and p.bias is not None else None
    return q, k, v, made, back


def _pulled_bias(
    p: Problem, bias: Tensor, lines: list[Lines], of: tuple[Sizes, Keep, Back], fit: Tiles, widths: dict[str, int]
) -> Tensor:
    size, keep, back = of
    apart = Apart(*bias.shape[:3])
    made = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    rows = triton.cdiv(size.n, fit.rows) if apart.queries > 1 else 1
    grid = (triton.cdiv(size.m, fit.keys) * apart.texts * apart.heads, rows)
    _call(
        backward.pull_bias, grid, *lines, size, keep, _shared(bias), back, apart, p.q.shape[0], made,
        ROWS=apart.queries > 1, **widths,
    )  # fmt: skip
    return made


def _pulled_sink(sink: Tensor, back: Back) -> Tensor:
    """A sink has a weight, like a key, and no value; where nothing is seen it has all of it, and gives nothing."""
    return -((sink[:, None] - back.lse).exp() * back.met).sum((0, 2))


def _rows(
    p: Problem, q: Lines, k: Lines, size: Sizes, keep: Keep, bias: Lines | None, fit: Tiles, widths: dict[str, int]
) -> Answer:
    b, groups = p.q.shape[0], size.heads // size.group
    programs = triton.cdiv(size.n * size.group, fit.rows)
    plain = not (p.entropy or p.place or p.first_at is not None or p.carry is not None)
    span = blocks.span(size.m, programs * b * groups, whole=p.mean or not plain)
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
    grid, given = (programs * b * groups, splits), (q, k, _lines(p.v), size, keep, bias)
    sizes = {"BM": fit.rows, "BN": fit.keys, "BE": _power(size.e), "BC": _power(size.c), **widths}
    if p.form:
        _call(weighing.weigh_rows, grid, *given, p.first_at, carry, found, span, MEAN=p.mean, **sizes)
    else:
        _call(kernels.attend_rows, grid, *given, p.sink, p.first_at, carry, found, span, **sizes)
    if splits > 1:
        heads, whole = (out.sum(0).transpose(1, 2), lse[0]) if p.form else _merged(out.transpose(2, 3), lse)
        return Answer(heads.transpose(1, 2).contiguous().transpose(1, 2), whole)  # laid out as without a split
    alone = {name: x[0] for name, x in zip(Found._fields, found, strict=True) if x is not None}
    alone["out"] = alone["out"].transpose(1, 2)
    if p.carry is not None:
        alone["carried"] = alone["carried"].mean(1)
    return Answer(**alone)


def _with(answer: Answer, **more: Tensor) -> Answer:
    return Answer(**{**answer.__dict__, **more})


def _call(kernel: Any, grid: tuple[int, ...], lines: Lines, /, *args: Any, **sizes: int) -> None:
    launched: Callable[..., object] = kernel[grid]
    with torch.cuda.device_of(lines.at):  # else triton would take the current card, where these tensors need not be
        launched(lines, *args, **sizes)


def _power(width: int) -> int:
    """What a matrix product takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(width))


def _close(x: Tensor) -> Tensor:
    """The last axis without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _lines(x: Tensor) -> Lines:
    x = _close(x)
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
    shape = h, h // p.k.shape[1], p.q.shape[2], p.k.shape[2], p.q.shape[3], p.v.shape[3], c
    return Sizes(*shape, p.scale, p.softcap, _widened(p.q), *_forms(p))


def _forms(p: Problem | Step) -> tuple[float | None, float | None]:
    """The shift of either form; None where it is the other, or none."""
    return p.shift if p.form == "sigmoid" else None, p.shift if p.form == "relu" else None


def _widened(q: Tensor) -> int | None:
    return 1 if interpreted() and q.dtype == torch.bfloat16 else None


def _keep(p: Problem) -> Keep:
    table, text = p.table, p.is_text
    named = (0, 0, 1, 1) if table is None else (*_strides(table), table.shape[1], table.shape[3])
    text_b = 0 if text is None or text.shape[0] == 1 else text.stride(0)
    ranges = p.ranges.contiguous()  # kernels go from row to row as if nothing stood between them
    return Keep(ranges, *_strides(ranges), table, *named, p.block or 1, text, text_b)
