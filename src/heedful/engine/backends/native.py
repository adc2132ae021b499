"""heedful's own kernel for the CPU: attention and the pattern's summary in one pass; masks are ranges of keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.ragged import Ragged, padded
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.mapless import STRETCHES, first_columns, kept_back, lag, of_weights, seen_by, through
from heedful.engine.needs import Needs
from heedful.native import Library, Problem, library

GRAIN = 32  # what a block of a block table must be a multiple of: the widest panel of the kernel


class Native:
    name = "native"
    gradients = False

    def refuses(self, needs: Needs) -> list[str]:
        kernel = library()
        reasons = [kernel] if isinstance(kernel, str) else []
        reasons += kept_back(needs)
        if needs.gradients:
            reasons.append("gradients are wanted, which this kernel cannot serve")
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
        if not reasons and not needs.sees_all and needs.key_ranges is None:
            reasons.append(STRETCHES)
        return reasons

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        kernel = library()
        if isinstance(kernel, str):
            raise BackendError(kernel)
        return through(lambda plain: _compute(kernel, plain, q, k, v), job, q, k, v), None


def _compute(kernel: Library, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call, accumulator = job.call, job.accumulator
    b, h, n, d = q.shape
    p = Problem(b, h, k.shape[1], n, k.shape[2], d, v.shape[3])
    p.scale, p.threads, p.bfloat16 = call.scale, torch.get_num_threads(), q.dtype == torch.bfloat16
    p.exact = bool(job.plan.reweights)  # what a shift takes away again must not have been rounded
    held: list[Tensor] = []  # what the kernel points at must outlive it

    def at(x: Tensor) -> int:
        held.append(x)
        return x.data_ptr()

    one = n == 1 and not call.mask.blocks
    if one and isinstance(k, Ragged) and isinstance(v, Ragged) and k.counts == v.counts:
        p.held, k, v = at(k.table), k.flat, v.flat
    q, k, v = _in_rows(q), _in_rows(k), _in_rows(v)
    out = torch.empty(b, n, h, p.value_width)
    p.q, p.k, p.v, p.out = at(q), at(k), at(v), at(out)
    p.q_stride, p.k_stride, p.v_stride = _strides(q), _strides(k), _strides(v)
    needs = job.needs
    if needs is None or not (needs.sees_all and (p.held or call.keys.is_filled is None)):
        rows = None if needs is None else needs.key_ranges
        if rows is None:
            raise BackendError("the native kernel was not asked if it can serve")
        ranges = rows.expand(-1, -1, n, -1, -1).to(torch.int32).contiguous()
        p.ranges, p.range_count = at(ranges), ranges.shape[3]
        p.range_stride[:] = [ranges.stride(i) if ranges.shape[i] > 1 else 0 for i in (0, 1)]
    p.softcap = call.softcap or 0.0
    if job.bias is not None:
        bias = _in_rows(job.bias.detach().float())
        p.bias = at(bias)
        p.bias_stride[:] = [bias.stride(i) if bias.shape[i] > 1 else 0 for i in range(3)]
    if job.sink is not None:
        p.sink = at(job.sink.detach().float().reshape(-1).contiguous())
    for blocks in call.mask.blocks:
        table = blocks.table.to(torch.uint8).contiguous()
        p.blocks, p.block, p.block_cols, p.block_units = at(table), blocks.size, table.shape[3], table.shape[1]
        p.block_stride[:] = [table.stride(i) if table.shape[i] > 1 else 0 for i in (0, 1)]
    if accumulator is not None:
        _ask(p, accumulator, call, at)
    kernel.attend(p)
    if accumulator is not None:
        accumulator.whole = _told(p, accumulator, held)
    return out.transpose(1, 2)


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of text, head and token; of the token alone where heads are held flat."""
    return (*(0,) * (4 - x.dim()), *x.stride()[:-1])


def _in_rows(x: Tensor) -> Tensor:
    """As the kernel reads it: the last axis without gaps."""
    x = padded(x)
    return x if x.stride(-1) == 1 else x.contiguous()


def _ask(p: Problem, accumulator: SummaryAccumulator, call: Call, at: Callable[[Tensor], int]) -> None:
    """Give the kernel a place for each part of the summary."""
    b, h, n, k = p.batch, p.heads, p.queries, p.keys
    if call.queries.is_filled is not None:
        is_text = call.queries.is_filled[:, 0].to(torch.uint8).contiguous()
        p.live, p.live_stride = at(is_text), is_text.stride(0) if len(is_text) > 1 else 0
    if n == 1 and not p.blocks:
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


def _told(p: Problem, accumulator: SummaryAccumulator, held: list[Tensor]) -> Summary:
    """The summary that the kernel wrote."""
    where = {x.data_ptr(): x for x in held}
    if p.queries == 1 and not p.blocks:
        return of_weights(where[p.received], accumulator)
    found = {
        name: where.get(getattr(p, name) or 0)
        for name in ("received", "entropy", "peak", "first", "distance", "carried")
    }
    call, place = accumulator.call, where.get(p.place or 0)
    seen = seen_by(call, where[p.ranges].long(), p.keys).expand(p.batch, p.heads, -1) if p.received else None
    return Summary(**found, seen=seen, place=None if place is None else place.long(), nearest=p.nearest)
