"""What the native kernel is told of a call, and what it answers, there and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Dense, Mask
from heedful.core.ragged import Ragged, padded
from heedful.core.sites import Site
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.core.values import replace
from heedful.core.weighing import FORMS
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.mapless import first_columns, lag, of_weights, seen_by, weighing
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.plan import Plan
from heedful.engine.run_state import RunState
from heedful.native import Library, Problem

# of a problem, what is asked on the way back too
WAY_BACK = ("ranges", "table", "blocks", "bias", "diagonals", "sink", "live", "rows")
STRIDES = {
    "ranges": "range_stride", "table": "table_stride", "blocks": "block_stride", "bias": "bias_stride",
    "picked": "picked_stride",
}  # fmt: skip


def alone(call: Call) -> bool:
    """Whether there is one query for each head; where there is no way back, it reads the cache as it lies."""
    return call.queries.single and not call.mask.blocks


@dataclass(frozen=True, eq=False)
class Asked:
    """A problem, and what it points at, which must outlive it."""

    problem: Problem
    alone: bool
    held: dict[str, Tensor] = field(default_factory=dict)  # by the problem's fields

    def hold(self, name: str, x: Tensor) -> Tensor:
        """Let a field of the problem point at a tensor."""
        self.held[name] = x
        point(self.problem, name, x)
        return x


def point(p: Problem, name: str, x: Tensor) -> None:
    """Let a field of a problem point at a tensor as it lies."""
    if name == "diagonals":  # the first query's row is the last
        p.bias, p.diagonal = x.data_ptr() + x.element_size() * (p.queries - 1), True
        p.bias_stride[:] = (*_shared(x, 2), -1)
        return
    setattr(p, name, x.data_ptr())
    if name in STRIDES:
        strides = getattr(p, STRIDES[name])
        strides[:] = _shared(x, len(strides))


class _Way(torch.autograd.Function):
    """The way back through a call that the kernel has computed: from heads, and from received sums where they learn."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        kernel: Library,
        job: AttentionCall,
        answer: tuple[Asked, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        asked, out = answer
        ctx.names = tuple(name for name in WAY_BACK if name in asked.held)
        # a checkpoint frees what is saved here, and makes it again: all that is as large as a tile
        ctx.save_for_backward(q, k, v, bias, out, *(asked.held[name] for name in ctx.names))
        ctx.set_materialize_grads(False)  # what received sums are not given costs no pass
        # not the job: a run holds penalties of the graph, and no collector finds the circle
        ctx.kernel, ctx.problem, ctx.sink = kernel, asked.problem, job.sink
        ctx.plan = Plan(job.plan.at(Site.NORMALISE))
        ctx.call = replace(job.call, mask=Mask()) if "table" in ctx.names else job.call
        ctx.fresh = partial(RunState, job.run_state.stack, job.run_state.params)
        counted = job.accumulator  # torch writes the way back into what is returned, and so into the summary
        return out, counted.whole.received if counted is not None and counted.learned and counted.whole else None

    @staticmethod
    def backward(ctx: Any, given: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, *held = ctx.saved_tensors
        tensors, asks = [q, k, v, bias], ctx.needs_input_grad[:4]
        given = torch.zeros_like(out) if given is None else given
        if torch.is_grad_enabled():  # somebody wants to derive once more
            needs = Needs(tensors=(q, k, v), learned=() if bias is None else (bias,))
            table = dict(zip(ctx.names, held, strict=True)).get("table")
            call = ctx.call if table is None else replace(ctx.call, mask=Mask((Dense(table.bool()),)))
            diagonal = "diagonals" in ctx.names
            job = AttentionCall(ctx.plan, ctx.fresh(), call, bias, ctx.sink, needs=needs, diagonal=diagonal)
            found = iter(_again(job, tensors[:3], given, columns, asks))
            return *(next(found) if wanted else None for wanted in asks), None, None, None
        for name, x in zip(ctx.names, held, strict=True):
            point(ctx.problem, name, x)  # who saves tensors elsewhere may lay them out anew
        made = pulled(ctx.kernel, ctx.problem, tensors, out, given, columns, asks[3])
        found = (new.sum_to_size(x.shape).to(x.dtype) for new, x in zip(made, tensors, strict=False))
        return *found, *(None,) * (7 - len(made))


def _again(
    job: AttentionCall, tensors: list[Tensor], given: Tensor, columns: Tensor | None, asks: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    counted = SummaryAccumulator(frozenset({"received"} if columns is not None else ()), job.call, learned=True)
    heads = Tiled()(replace(job, accumulator=counted), *tensors)[0]
    wanted = [x for x, asked in zip([*tensors, job.bias], asks, strict=True) if x is not None and asked]
    made, slopes = [heads], [given.to(heads.dtype)]
    if columns is not None and (received := counted.summary().received) is not None:
        made, slopes = [heads, received], [*slopes, columns.to(received.dtype)]
    return torch.autograd.grad(made, wanted, slopes, create_graph=True)


def pulled(
    kernel: Library,
    p: Problem,
    tensors: list[Tensor],
    out: Tensor,
    given: Tensor,
    columns: Tensor | None,
    learns: bool,
) -> list[Tensor]:
    """What queries, keys and values are given, in float32, and what a bias that learns is, text by text."""
    q, k, v = (_in_rows(x) for x in tensors[:3])
    p.q_stride, p.k_stride, p.v_stride = _strides(q), _strides(k), _strides(v)
    columns = None if columns is None else columns.float().contiguous()
    p.columns = 0 if columns is None else columns.data_ptr()
    given, out = _in_rows(given.float()), out.transpose(1, 2).contiguous()
    p.q, p.k, p.v, p.out, p.given = (x.data_ptr() for x in (q, k, v, out, given))
    p.given_stride[:] = _shared(given, 3)
    made = [
        torch.empty(out.shape[0], p.queries, p.heads, p.width).transpose(1, 2),
        torch.zeros(k.shape),
        torch.zeros(v.shape),
    ]
    p.to_q, p.to_k, p.to_v = (x.data_ptr() for x in made)
    if learns:
        each = (1, p.queries + p.keys - 1) if p.diagonal else (p.queries, p.keys)
        made.append(torch.zeros(out.shape[0], p.heads, *each))
        p.to_bias = made[-1].data_ptr()
    kernel.pull(p)
    return made


def computed(kernel: Library, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if job.needs is None or not job.needs.gradients:
        return attended(kernel, job, (q, k, v))[1]
    with torch.no_grad():
        answer = attended(kernel, job, (q, k, v), back=True)
    return _Way.apply(padded(q), padded(k), padded(v), job.bias, kernel, job, answer)[0]


def attended(
    kernel: Library, job: AttentionCall, tensors: tuple[Tensor, Tensor, Tensor], back: bool = False
) -> tuple[Asked, Tensor]:
    (q, k, v), call, accumulator = tensors, job.call, job.accumulator
    needs = job.needs or Needs(call=call)
    b, h, n, d = q.shape
    p = Problem(b, h, k.shape[1], n, k.shape[2], d, v.shape[3])
    asked = Asked(p, alone(call) and not back)
    p.scale, p.threads, p.bfloat16 = call.scale, torch.get_num_threads(), q.dtype == torch.bfloat16
    p.exact = bool(job.plan.reweights)  # what a reweighting takes away again must not have been rounded
    if asked.alone and isinstance(k, Ragged) and isinstance(v, Ragged) and k.counts == v.counts:
        asked.hold("held", k.table)
        k, v = k.flat, v.flat
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    p.out_bfloat16 = p.bfloat16 and not p.exact and not back  # who goes on computing with it wants it unrounded
    out = torch.empty(b, n, h, p.value_width, dtype=q.dtype if p.out_bfloat16 else torch.float32)
    p.q, p.k, p.v, p.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
    p.q_stride, p.k_stride, p.v_stride = _strides(q), _strides(k), _strides(v)
    _tell_mask(asked, needs, call)
    p.softcap = call.softcap or 0.0
    if Site.NORMALISE in job.plan.acts and (form := weighing(job)) is not None:
        p.form, p.shift, p.mean = 1 + FORMS.index(form.form), form.shift, form.mean
    if job.bias is not None:
        asked.hold("diagonals" if job.diagonal else "bias", _in_rows(job.bias.detach().float()))
    if job.sink is not None:
        asked.hold("sink", job.sink.detach().float().reshape(-1).contiguous())
    if back:
        asked.hold("rows", torch.empty(b, h, n, 2))
    if accumulator is not None:
        _ask(asked, accumulator, call)
    kernel.attend(p)
    if accumulator is not None:
        accumulator.whole = _told(asked, accumulator)
    return asked, out.transpose(1, 2)


def _tell_mask(asked: Asked, needs: Needs, call: Call) -> None:
    """Which keys each query sees: all, ranges of them, or, where a query is alone, those that are named."""
    p = asked.problem
    for blocks in call.mask.blocks:
        table = asked.hold("blocks", blocks.table.to(torch.uint8).contiguous())
        p.block, p.block_cols, p.block_units = blocks.size, table.shape[3], table.shape[1]
    even = call.keys.is_filled is None
    if asked.alone and call.mask.idle(call.queries, call.keys):
        if even or (p.held and call.keys.filled is not None):
            return
    elif asked.alone:
        kept = call.mask.keeps(call.pairs)
        if kept is None or bool(kept.all()):
            return
        asked.hold("picked", kept.to(torch.uint8).contiguous())
        return
    rows = needs.key_ranges
    if rows is None:  # of a tile, whose mask is a table
        (rule,) = call.mask.rules
        kept = rule.keeps(call.pairs)
        asked.hold("table", _in_rows(kept.view(torch.uint8)))
        rows = torch.tensor([0, p.keys]).view(1, 1, 1, 1, 2)
    ranges = asked.hold("ranges", rows.expand(-1, -1, p.queries, -1, -1).to(torch.int32).contiguous())
    p.range_count = ranges.shape[3]


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of text, head and token; of the token alone where heads are held flat."""
    return (*(0,) * (4 - x.dim()), *x.stride()[:-1])


def _shared(x: Tensor, axes: int) -> list[int]:
    """Strides of the first axes, 0 where one stands for all."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in range(axes)]


def _in_rows(x: Tensor) -> Tensor:
    """As the kernel reads it: the last axis without gaps."""
    x = padded(x) if isinstance(x, Ragged) else x
    return x if x.stride(-1) == 1 else x.contiguous()


def _ask(asked: Asked, accumulator: SummaryAccumulator, call: Call) -> None:
    """Give the kernel a place for each part of the summary."""
    p, hold = asked.problem, asked.hold
    b, h, n, k = p.batch, p.heads, p.queries, p.keys
    if call.queries.is_filled is not None:
        is_text = hold("live", call.queries.is_filled[:, 0].to(torch.uint8).contiguous())
        p.live_stride = is_text.stride(0) if len(is_text) > 1 else 0
    if asked.alone:
        hold("received", torch.zeros(b, h, k))  # the weights themselves: everything else is drawn from them
        return
    if "received" in accumulator.requested:
        hold("received", torch.zeros(b, h, k))
    if "entropy" in accumulator.requested:
        hold("entropy", torch.zeros(b, h, n))
    if accumulator.requested & {"peak", "place"}:
        hold("peak", torch.zeros(b, h, n))
    if "place" in accumulator.requested:
        hold("place", torch.zeros(b, h, n, dtype=torch.int32))
    if "first" in accumulator.requested:
        hold("first_at", first_columns(call, b))
        hold("first", torch.zeros(b, h, n))
    if accumulator.carry is not None:
        p.carry_width = accumulator.carry.shape[-1]
        hold("carry", accumulator.carry.float().expand(b, -1, -1).contiguous())
        hold("carried", torch.zeros(b, n, p.carry_width))
    if "distance" in accumulator.requested:
        p.nearest, p.reach = accumulator.nearest, accumulator.reach
        p.q_first = lag(call)
        hold("distance", torch.zeros(b, h, p.reach))


def _told(asked: Asked, accumulator: SummaryAccumulator) -> Summary:
    """The summary that the kernel wrote."""
    p, held = asked.problem, asked.held
    if asked.alone:
        return of_weights(held["received"], accumulator)
    found = {name: held.get(name) for name in ("received", "entropy", "peak", "first", "distance", "carried")}
    call, place = accumulator.call, held.get("place")
    seen = seen_by(call, held["ranges"].long(), p.keys).expand(p.batch, p.heads, -1) if p.received else None
    return Summary(**found, seen=seen, place=None if place is None else place.long(), nearest=p.nearest)
