"""heedful's own kernel for the CPU: attention and the pattern's summary in one pass; masks are ranges of keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.mask import Dense, Mask
from heedful.core.paper import Paper
from heedful.core.ragged import Ragged, padded
from heedful.core.rules import Arranged, Ranged
from heedful.core.sites import Site
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.core.values import replace
from heedful.core.weighing import FORMS
from heedful.engine.attend import gained
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
from heedful.engine.plan import Plan
from heedful.engine.run_state import RunState
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
        "A bias that learns is cut into blocks of rows, which have their gradients one after another.",
    ),
)

WAY_BACK = ("ranges", "table", "blocks", "bias", "sink", "live", "rows")  # of a problem, what is asked there too
STRIDES = {
    "ranges": "range_stride", "table": "table_stride", "blocks": "block_stride", "bias": "bias_stride",
    "picked": "picked_stride",
}  # fmt: skip
GRAIN = 32  # what a block of a block table must be a multiple of: the widest panel of the kernel


class Native:
    name = "native"
    gradients = True

    def refuses(self, needs: Needs) -> list[str]:
        kernel = library()
        reasons = [kernel] if isinstance(kernel, str) else []
        reasons += kept_back(needs)
        if needs.gradients and (needs.reweights or needs.sink_learns):
            what = "sink logits" if needs.sink_learns else f"what {needs.reweights[0]} moves"
            reasons.append(f"gradients are wanted of {what}, which this kernel has not")
        for x in needs.tensors:
            if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
                reasons.append(f"it runs on the CPU in float32 and bfloat16, and this call is {x.dtype} on {x.device}")
                break
        if len({x.dtype for x in needs.tensors}) > 1:
            reasons.append("queries, keys and values are of unlike types")
        if not reasons and (needs.sums or needs.reweights) and (why := _why_tiles(needs)):
            reasons.append(f"{why}, and tile by tile it sums nothing up")
        return reasons

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        kernel = library()
        if isinstance(kernel, str):
            raise BackendError(kernel)
        needs = job.needs or Needs(call=job.call)
        if (rule := _arranged(needs)) is not None:
            return _in_order(kernel, job, rule, q, k, v), None
        if _why_tiles(needs):
            return Tiled(compute=partial(_tile, kernel))(job, q, k, v)
        if not job.plan.reweights:
            return _compute(kernel, job, q, k, v), None
        return through(lambda plain: _compute(kernel, plain, q, k, v), job, q, k, v), None


def _why_tiles(needs: Needs) -> str:
    """Why a call is not computed as a whole, if so: a tile of it can have a table of pairs, and a bias for each."""
    if needs.adds:
        return f"{needs.adds[0]} says tile by tile what scores gain"
    if needs.call is None:
        return ""
    if needs.gradients and needs.bias_learns:
        return "gradients are wanted of the bias"
    blocks = needs.call.mask.blocks
    if blocks and (len(blocks) > 1 or any(b.size % GRAIN for b in blocks)):
        return f"there is more than one block table of blocks that are a multiple of {GRAIN} wide"
    if blocks and any(b.first is not None for b in blocks):
        return "blocks begin with the text, and padding on the left moves them off the kernel's panels"
    passes = needs.gradients or not _alone(needs.call)
    return STRETCHES if passes and needs.key_ranges is None else ""


def _arranged(needs: Needs) -> Arranged | None:
    """The rule of a call that leaves out no pair but by an order of its tokens."""
    call = needs.call
    if call is None or needs.adds or needs.bias or call.keys.is_filled is not None:
        return None
    rules = call.mask.acting(call.queries, call.keys)
    return rules[0] if len(rules) == 1 and isinstance(rules[0], Arranged) else None


def _in_order(kernel: Library, job: AttentionCall, rule: Arranged, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A call whose tokens stand in the order of a rule, where each query's keys are ranges."""
    order = rule.place.long().argsort(-1)[..., None]
    ranges = rule.ranges.long().take_along_dim(order[..., None], 2)
    q, k, v = (x.take_along_dim(order, 2) for x in (q, job.call.spread(k), job.call.spread(v)))
    call = replace(job.call, mask=Mask((Ranged(ranges),)), kv_heads=job.call.heads)
    needs = replace(job.needs or Needs(), call=call, tensors=(q, k, v))
    heads = _compute(kernel, replace(job, call=call, needs=needs), q, k, v)
    return heads.take_along_dim(rule.place.long()[..., None], 2)


def _tile(kernel: Library, job: AttentionCall, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A tile, as a call of its own: its mask is a table, and what its scores gain is a bias.

    A gain of minus infinity leaves no weight, so the kernel need not be told that the pair is not to be seen, but
    where it leaves nothing of a row, which shows in the heads, and where a weight may be a share of what a query sees.
    """
    gains = gained(job, call, q)
    heads = _gaining(kernel, job, call, gains, q, k, v)
    told = job.plan.at(Site.NORMALISE) or bool(heads.detach().isnan().any())
    if gains is None or not told or not bool((hidden := gains == -torch.inf).any()):
        return heads
    hidden = hidden.expand(-1, -1, len(call.queries), -1)
    seen = replace(call, keep=~hidden if call.keep is None else call.keep & ~hidden)
    return _gaining(kernel, job, seen, gains.masked_fill(hidden, 0.0), q, k, v)


def _gaining(
    kernel: Library, job: AttentionCall, call: Call, gains: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    mask = Mask() if call.keep is None else Mask((Dense(call.keep, apart=True),))
    own = replace(call, mask=mask, rows=slice(None), cols=slice(None), keep=None)
    learned = () if gains is None else (gains,)
    needs = replace(job.needs or Needs(), call=own, tensors=(q, k, v), learned=learned, adds=())
    plan = Plan(job.plan.at(Site.NORMALISE))
    return _compute(kernel, replace(job, plan=plan, call=own, bias=gains, needs=needs, spare=None), q, k, v)


def _alone(call: Call) -> bool:
    """Whether there is one query for each head; where there is no way back, it reads the cache as it lies."""
    return call.queries.single and not call.mask.blocks


@dataclass(frozen=True, eq=False)
class _Asked:
    """A problem, and what it points at, which must outlive it."""

    problem: Problem
    alone: bool
    held: dict[str, Tensor] = field(default_factory=dict)  # by the problem's fields

    def hold(self, name: str, x: Tensor) -> Tensor:
        """Let a field of the problem point at a tensor."""
        self.held[name] = x
        _point(self.problem, name, x)
        return x


def _point(p: Problem, name: str, x: Tensor) -> None:
    """Let a field of a problem point at a tensor as it lies."""
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
        answer: tuple[_Asked, Tensor],
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
            job = AttentionCall(ctx.plan, ctx.fresh(), call, bias, ctx.sink, needs=needs)
            found = iter(_again(job, tensors[:3], given, columns, asks))
            return *(next(found) if wanted else None for wanted in asks), None, None, None
        for name, x in zip(ctx.names, held, strict=True):
            _point(ctx.problem, name, x)  # who saves tensors elsewhere may lay them out anew
        made = _pulled(ctx.kernel, ctx.problem, tensors, out, given, columns, asks[3])
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


def _pulled(
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
        made.append(torch.zeros(out.shape[0], p.heads, p.queries, p.keys))
        p.to_bias = made[-1].data_ptr()
    kernel.pull(p)
    return made


def _compute(kernel: Library, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if job.needs is None or not job.needs.gradients:
        return _attended(kernel, job, (q, k, v))[1]
    with torch.no_grad():
        answer = _attended(kernel, job, (q, k, v), back=True)
    return _Way.apply(padded(q), padded(k), padded(v), job.bias, kernel, job, answer)[0]


def _attended(
    kernel: Library, job: AttentionCall, tensors: tuple[Tensor, Tensor, Tensor], back: bool = False
) -> tuple[_Asked, Tensor]:
    (q, k, v), call, accumulator = tensors, job.call, job.accumulator
    needs = job.needs or Needs(call=call)
    b, h, n, d = q.shape
    p = Problem(b, h, k.shape[1], n, k.shape[2], d, v.shape[3])
    asked = _Asked(p, _alone(call) and not back)
    p.scale, p.threads, p.bfloat16 = call.scale, torch.get_num_threads(), q.dtype == torch.bfloat16
    p.exact = bool(job.plan.reweights)  # what a shift takes away again must not have been rounded
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
        asked.hold("bias", _in_rows(job.bias.detach().float()))
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


def _tell_mask(asked: _Asked, needs: Needs, call: Call) -> None:
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


def _ask(asked: _Asked, accumulator: SummaryAccumulator, call: Call) -> None:
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


def _told(asked: _Asked, accumulator: SummaryAccumulator) -> Summary:
    """The summary that the kernel wrote."""
    p, held = asked.problem, asked.held
    if asked.alone:
        return of_weights(held["received"], accumulator)
    found = {name: held.get(name) for name in ("received", "entropy", "peak", "first", "distance", "carried")}
    call, place = accumulator.call, held.get("place")
    seen = seen_by(call, held["ranges"].long(), p.keys).expand(p.batch, p.heads, -1) if p.received else None
    return Summary(**found, seen=seen, place=None if place is None else place.long(), nearest=p.nearest)
