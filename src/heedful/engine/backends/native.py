"""heedful's own kernel for the CPU: attention and the pattern's summary in one pass; masks are ranges of keys."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.paper import Paper
from heedful.core.ragged import Ragged, padded
from heedful.core.sites import Site
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.core.weighing import FORMS
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.mapless import (
    STRETCHES,
    first_columns,
    kept_back,
    lag,
    of_weights,
    seen_by,
    through,
    weighing,
)
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.run_state import Plan, RunState
from heedful.native import Library, Problem, library

PAPER = Paper(
    "P139",
    "Flash Window Attention: speedup the attention computation for Swin Transformer",
    "Zhendong Zhang",
    2025,
    "2501.06480",
    differs=(
        "For a CPU: a window's map stays in the cache of the core that makes it, where the paper's stays in a GPU's "
        "shared memory, and is made again on the way back from what each row had for a maximum and a sum.",
        "Features are not divided: a core's cache holds all of a window's queries, keys and values.",
        "A bias that learns is given its gradient by another backend.",
    ),
)

GRAIN = 32  # what a block of a block table must be a multiple of: the widest panel of the kernel


class Native:
    name = "native"
    gradients = True

    def refuses(self, needs: Needs) -> list[str]:
        kernel = library()
        reasons = [kernel] if isinstance(kernel, str) else []
        reasons += kept_back(needs)
        if needs.gradients and (needs.reweights or any(x.requires_grad for x in needs.learned)):
            reasons.append("gradients of more than queries, keys and values are wanted, which this kernel cannot serve")
        for x in needs.tensors:
            if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
                reasons.append(f"it runs on the CPU in float32 and bfloat16, and this call is {x.dtype} on {x.device}")
                break
        if needs.call is None:
            return reasons
        if len({x.dtype for x in needs.tensors}) > 1:
            reasons.append("queries, keys and values are of unlike types")
        blocks = needs.call.mask.blocks
        if len(blocks) > 1 or any(b.size % GRAIN for b in blocks):
            reasons.append(f"it takes one block table, of blocks that are a multiple of {GRAIN} wide")
        if any(b.first is not None for b in blocks):
            reasons.append("blocks begin with the text, and padding on the left moves them off its panels")
        passes = needs.gradients or not _alone(needs.call)
        if not reasons and passes and needs.key_ranges is None:
            reasons.append(STRETCHES)
        return reasons

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        kernel = library()
        if isinstance(kernel, str):
            raise BackendError(kernel)
        return through(lambda plain: _compute(kernel, plain, q, k, v), job, q, k, v), None


def _alone(call: Call) -> bool:
    """Whether there is one query for each head; where there is no way back, it reads the cache as it lies."""
    return len(call.queries) == 1 and not call.mask.blocks


@dataclass(frozen=True, eq=False)
class _Asked:
    """A problem, and what it points at, which must outlive it."""

    problem: Problem
    alone: bool
    held: list[Tensor] = field(default_factory=list)

    def at(self, x: Tensor) -> int:
        self.held.append(x)
        return x.data_ptr()


class _Way(torch.autograd.Function):
    """The way back through a call that the kernel has computed: from heads, and from received sums where they learn."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Library, job: AttentionCall, answer: tuple[_Asked, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        asked, out = answer
        ctx.save_for_backward(q, k, v, out)
        ctx.set_materialize_grads(False)  # what received sums are not given costs no pass
        # not the job: a run holds penalties of the graph, and no collector finds the circle
        ctx.kernel, ctx.asked = kernel, asked
        plan, call = Plan(job.plan.at(Site.NORMALISE)), job.call
        ctx.plain = partial(AttentionCall, plan, call=call, bias=job.bias, sink=job.sink, needs=job.needs)
        ctx.fresh = partial(RunState, job.run_state.stack, job.run_state.params)
        counted = job.accumulator  # torch writes the way back into what is returned, and so into the summary
        return out, counted.whole.received if counted is not None and counted.learned and counted.whole else None

    @staticmethod
    def backward(ctx: Any, given: Tensor | None, columns: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out = ctx.saved_tensors
        given = torch.zeros_like(out) if given is None else given
        if torch.is_grad_enabled():  # somebody wants to derive once more
            found = iter(_again(ctx.plain(ctx.fresh()), tensors, given, columns))
            return *(next(found) if x.requires_grad else None for x in tensors), None, None, None
        made = _pulled(ctx.kernel, ctx.asked.problem, tensors, out, given, columns)
        return *(new.to(x.dtype) for new, x in zip(made, tensors, strict=True)), None, None, None


def _again(job: AttentionCall, tensors: list[Tensor], given: Tensor, columns: Tensor | None) -> tuple[Tensor, ...]:
    counted = SummaryAccumulator(frozenset({"received"} if columns is not None else ()), job.call, learned=True)
    heads = Tiled()(replace(job, accumulator=counted), *tensors)[0]
    wanted = [x for x in tensors if x.requires_grad]
    made, slopes = [heads], [given.to(heads.dtype)]
    if columns is not None and (received := counted.summary().received) is not None:
        made, slopes = [heads, received], [*slopes, columns.to(received.dtype)]
    return torch.autograd.grad(made, wanted, slopes, create_graph=True)


def _pulled(
    kernel: Library, p: Problem, tensors: list[Tensor], out: Tensor, given: Tensor, columns: Tensor | None
) -> list[Tensor]:
    """What queries, keys and values are given, in float32."""
    q, k, v = (_in_rows(x) for x in tensors)
    columns = None if columns is None else columns.float().contiguous()
    p.columns = 0 if columns is None else columns.data_ptr()
    given, out = _in_rows(given.float()), out.transpose(1, 2)
    p.q, p.k, p.v, p.out, p.given = (x.data_ptr() for x in (q, k, v, out, given))
    p.given_stride[:] = _shared(given, 3)
    made = [
        torch.empty(out.shape[0], p.queries, p.heads, p.width).transpose(1, 2),
        torch.zeros(k.shape),
        torch.zeros(v.shape),
    ]
    p.to_q, p.to_k, p.to_v = (x.data_ptr() for x in made)
    kernel.pull(p)
    return made


def _compute(kernel: Library, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if job.needs is None or not job.needs.gradients:
        return _attended(kernel, job, (q, k, v))[1]
    with torch.no_grad():
        answer = _attended(kernel, job, (q, k, v), back=True)
    return _Way.apply(padded(q), padded(k), padded(v), kernel, job, answer)[0]


def _attended(
    kernel: Library, job: AttentionCall, tensors: tuple[Tensor, Tensor, Tensor], back: bool = False
) -> tuple[_Asked, Tensor]:
    (q, k, v), call, accumulator = tensors, job.call, job.accumulator
    needs = job.needs or Needs(call=call)
    b, h, n, d = q.shape
    p = Problem(b, h, k.shape[1], n, k.shape[2], d, v.shape[3])
    asked = _Asked(p, _alone(call) and not back)
    at = asked.at
    p.scale, p.threads, p.bfloat16 = call.scale, torch.get_num_threads(), q.dtype == torch.bfloat16
    p.exact = bool(job.plan.reweights)  # what a shift takes away again must not have been rounded
    if asked.alone and isinstance(k, Ragged) and isinstance(v, Ragged) and k.counts == v.counts:
        p.held, k, v = at(k.table), k.flat, v.flat
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    p.out_bfloat16 = p.bfloat16 and not p.exact and not back  # who goes on computing with it wants it unrounded
    out = torch.empty(b, n, h, p.value_width, dtype=q.dtype if p.out_bfloat16 else torch.float32)
    p.q, p.k, p.v, p.out = (x.data_ptr() for x in (q, k, v, out))
    p.q_stride, p.k_stride, p.v_stride = _strides(q), _strides(k), _strides(v)
    _tell_mask(asked, needs, call)
    p.softcap = call.softcap or 0.0
    if (form := weighing(job)) is not None:
        p.form, p.shift, p.mean = 1 + FORMS.index(form.form), form.shift, form.mean
    if job.bias is not None:
        bias = _in_rows(job.bias.detach().float())
        p.bias = at(bias)
        p.bias_stride[:] = _shared(bias, 3)
    if job.sink is not None:
        p.sink = at(job.sink.detach().float().reshape(-1).contiguous())
    if back:
        p.rows = at(torch.empty(b, h, n, 2))
    if accumulator is not None:
        _ask(asked, accumulator, call)
    kernel.attend(p)
    if accumulator is not None:
        accumulator.whole = _told(asked, accumulator)
    return asked, out.transpose(1, 2)


def _tell_mask(asked: _Asked, needs: Needs, call: Call) -> None:
    """Which keys each query sees: all, ranges of them, or, where a query is alone, those that are named."""
    p = asked.problem
    for blocks in call.mask.blocks:
        table = blocks.table.to(torch.uint8).contiguous()
        p.blocks, p.block, p.block_cols, p.block_units = asked.at(table), blocks.size, table.shape[3], table.shape[1]
        p.block_stride[:] = _shared(table, 2)
    if asked.alone and needs.sees_all and (p.held or call.keys.is_filled is None):
        return
    if asked.alone and not call.mask.idle(call.queries, call.keys):
        kept = call.mask.keeps(call.pairs)
        if kept is None or bool(kept.all()):
            return
        picked = kept.to(torch.uint8).contiguous()
        p.picked = asked.at(picked)
        p.picked_stride[:] = _shared(picked, 2)
    elif (rows := needs.key_ranges) is not None:
        ranges = rows.expand(-1, -1, p.queries, -1, -1).to(torch.int32).contiguous()
        p.ranges, p.range_count = asked.at(ranges), ranges.shape[3]
        p.range_stride[:] = _shared(ranges, 2)
    else:
        raise BackendError("the native kernel was not asked if it can serve")


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of text, head and token; of the token alone where heads are held flat."""
    return (*(0,) * (4 - x.dim()), *x.stride()[:-1])


def _shared(x: Tensor, axes: int) -> list[int]:
    """Strides of the first axes, 0 where one stands for all."""
    return [x.stride(i) if x.shape[i] > 1 else 0 for i in range(axes)]


def _in_rows(x: Tensor) -> Tensor:
    """As the kernel reads it: the last axis without gaps."""
    x = padded(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _ask(asked: _Asked, accumulator: SummaryAccumulator, call: Call) -> None:
    """Give the kernel a place for each part of the summary."""
    p, at = asked.problem, asked.at
    b, h, n, k = p.batch, p.heads, p.queries, p.keys
    if call.queries.is_filled is not None:
        is_text = call.queries.is_filled[:, 0].to(torch.uint8).contiguous()
        p.live, p.live_stride = at(is_text), is_text.stride(0) if len(is_text) > 1 else 0
    if asked.alone:
        p.received = at(torch.zeros(b, h, k))  # the weights themselves: everything else is drawn from them
        return
    if "received" in accumulator.requested:
        p.received = at(torch.zeros(b, h, k))
    if "entropy" in accumulator.requested:
        p.entropy = at(torch.zeros(b, h, n))
    if accumulator.requested & {"peak", "place"}:
        p.peak = at(torch.zeros(b, h, n))
    if "place" in accumulator.requested:
        p.place = at(torch.zeros(b, h, n, dtype=torch.int32))
    if "first" in accumulator.requested:
        p.first_at = at(first_columns(call, b))
        p.first = at(torch.zeros(b, h, n))
    if accumulator.carry is not None:
        p.carry, p.carry_width = (
            at(accumulator.carry.float().expand(b, -1, -1).contiguous()),
            accumulator.carry.shape[-1],
        )
        p.carried = at(torch.zeros(b, n, p.carry_width))
    if "distance" in accumulator.requested:
        p.nearest, p.reach = accumulator.nearest, accumulator.reach
        p.q_first = lag(call)
        p.distance = at(torch.zeros(b, h, p.reach))


def _told(asked: _Asked, accumulator: SummaryAccumulator) -> Summary:
    """The summary that the kernel wrote."""
    p, where = asked.problem, {x.data_ptr(): x for x in asked.held}
    if asked.alone:
        return of_weights(where[p.received], accumulator)
    found = {
        name: where.get(getattr(p, name) or 0)
        for name in ("received", "entropy", "peak", "first", "distance", "carried")
    }
    call, place = accumulator.call, where.get(p.place or 0)
    seen = seen_by(call, where[p.ranges].long(), p.keys).expand(p.batch, p.heads, -1) if p.received else None
    return Summary(**found, seen=seen, place=None if place is None else place.long(), nearest=p.nearest)
