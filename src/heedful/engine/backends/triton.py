"""heedful's own kernel for GPUs: attention and the pattern's summary without a map; masks are ranges of keys."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.ragged import padded
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.mapless import STRETCHES, first_columns, kept_back, lag, of_weights, seen_by, through
from heedful.engine.needs import Needs
from heedful.gpu import why_not

if TYPE_CHECKING:
    from heedful.gpu.launch import Answer, Problem

WIDEST = 256  # of a head
GRAIN = 64  # what a block of a block table must be a multiple of: the most keys that a tile has
TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Triton:
    name = "triton"
    gradients = True

    def refuses(self, needs: Needs) -> list[str]:
        call = needs.call
        likely = "cuda" if torch.cuda.is_available() else "cpu"
        device = needs.tensors[0].device if needs.tensors else torch.device(likely)
        reasons = [reason] if (reason := why_not(device)) else []
        reasons += kept_back(needs)
        if needs.gradients and (needs.reweights or any(x.requires_grad for x in needs.learned)):
            reasons.append("gradients of more than queries, keys and values are wanted, which this kernel cannot serve")
        if call is None or reasons:
            return reasons
        if any(x.dtype not in TYPES for x in needs.tensors) or len({x.dtype for x in needs.tensors}) > 1:
            reasons.append("it takes float16, bfloat16 and float32, and one type for queries, keys and values")
        if (widest := max(x.shape[-1] for x in needs.tensors)) > WIDEST:
            reasons.append(f"heads are {widest} wide, and {WIDEST} is the most that it takes")
        blocks = call.mask.blocks
        if len(blocks) > 1 or any(b.size % GRAIN or b.first is not None for b in blocks):
            reasons.append(f"it takes one block table that begins with the row, of blocks a multiple of {GRAIN} wide")
        if not reasons and needs.key_ranges is None:
            reasons.append(STRETCHES)
        return reasons

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        q, k, v = padded(q), padded(k), padded(v)
        return through(lambda plain: _compute(plain, q, k, v), job, q, k, v), None


class _Way(torch.autograd.Function):
    """The way back through a call that the kernel has computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, answer: Answer) -> Tensor:
        ctx.save_for_backward(q, k, v, answer.out, answer.lse)
        ctx.problem = problem
        return answer.out

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        from heedful.gpu.launch import pull

        if torch.is_grad_enabled():
            rule = "the kernel for GPUs has no second derivatives, and create_graph=True asks for them"
            raise BackendError(f"{rule}; attach with backend='tiled'")
        q, k, v, out, lse = ctx.saved_tensors
        made = pull(replace(ctx.problem, q=q, k=k, v=v), out, lse, given)
        return *(new.to(x.dtype) for new, x in zip(made, (q, k, v), strict=True)), None, None


def _compute(job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        problem, answer = _answered(job, q, k, v)
    if job.needs is not None and job.needs.gradients:
        heads: Tensor = _Way.apply(q, k, v, problem, answer)
        return heads
    return answer.out


def _answered(job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Problem, Answer]:
    from heedful.gpu.launch import Problem, attend

    call, accumulator = job.call, job.accumulator
    if job.needs is None or (found := job.needs.key_ranges) is None:
        raise ValueError("the kernel was not asked if it can serve")
    ranges = found.expand(-1, -1, q.shape[2], -1, -1).to(torch.int32).contiguous()
    asked = frozenset[str]() if accumulator is None else accumulator.requested
    table = call.mask.blocks[0] if call.mask.blocks else None
    one = q.shape[2] == 1 and table is None  # the weights themselves are no more than a summary
    problem = Problem(
        q, k, v, ranges, call.scale, softcap=call.softcap,
        bias=None if job.bias is None else job.bias.detach(),
        sink=None if job.sink is None else job.sink.detach().float().reshape(-1).contiguous(),
        table=None if table is None else table.table.to(torch.uint8).contiguous(),
        block=0 if table is None else table.size,
        is_text=None if call.queries.is_filled is None else call.queries.is_filled[:, 0].to(torch.uint8).contiguous(),
        received="received" in asked or (one and accumulator is not None),
        **({} if one or accumulator is None else _more(accumulator, call, len(q))),
    )  # fmt: skip
    answer = attend(problem)
    if accumulator is not None and one and answer.received is not None:
        accumulator.whole = of_weights(answer.received, accumulator)
    elif accumulator is not None:
        place = None if answer.place is None else answer.place.long()
        accumulator.whole = Summary(
            received=answer.received, seen=_seen(answer.received, call, ranges),
            entropy=answer.entropy, peak=answer.peak, place=place, first=answer.first, distance=answer.distance,
            carried=answer.carried, nearest=accumulator.nearest if "distance" in asked else 0,
        )  # fmt: skip
    return problem, answer


def _seen(received: Tensor | None, call: Call, ranges: Tensor) -> Tensor | None:
    return None if received is None else seen_by(call, ranges.long(), received.shape[-1]).expand(received.shape)


def _more(accumulator: SummaryAccumulator, call: Call, texts: int) -> dict[str, Any]:
    """What else a problem asks for, so that the summary is whole."""
    asked = accumulator.requested
    found: dict[str, Any] = {"entropy": "entropy" in asked, "place": bool(asked & {"peak", "place"})}
    if "first" in asked:
        found["first_at"] = first_columns(call, texts)
    if accumulator.carry is not None:
        found["carry"] = accumulator.carry.float().expand(texts, -1, -1).contiguous()
    if "distance" in asked:
        found |= {"offset": lag(call) - accumulator.nearest, "reach": accumulator.reach}
    return found
