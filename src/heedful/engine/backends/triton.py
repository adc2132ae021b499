"""heedful's own kernel for GPUs: attention and the pattern's summary without a map; masks are ranges of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.ragged import Ragged, padded
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import one_query
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
from heedful.engine.needs import Needs
from heedful.gpu import why_not
from heedful.gpu.blocks import ROWS, architecture, table, tiles

WIDEST = 256  # of a head
GRAIN = 64  # what a block of a block table must be a multiple of: the most keys that a tile has
PASSES = {"received": "add_columns", "distance": "add_diagonals"}  # over keys, for these parts of a summary
TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Triton:
    name = "triton"

    def refuses(self, needs: Needs) -> list[str]:
        call = needs.call
        reasons = [reason] if (reason := why_not(_device(needs))) else []
        reasons += kept_back(needs)
        reasons += [f"{step} says tile by tile what scores gain, and it has no tiles of ours" for step in needs.adds]
        if needs.gradients and needs.reweights:
            reasons.append(f"gradients are wanted through what {needs.reweights[0]} moves, which this kernel has not")
        if call is None or reasons:
            return reasons
        if any(x.dtype not in TYPES for x in needs.tensors) or len({x.dtype for x in needs.tensors}) > 1:
            reasons.append("it takes float16, bfloat16 and float32, and one type for queries, keys and values")
        if (widest := max(x.shape[-1] for x in needs.tensors)) > WIDEST:
            reasons.append(f"heads are {widest} wide, and {WIDEST} is the most that it takes")
        if len(call.queries) == 1 and not needs.gradients:
            return reasons  # whatever the mask is
        blocks = call.mask.blocks
        if len(blocks) > 1 or any(b.size % GRAIN or b.first is not None for b in blocks):
            reasons.append(f"it takes one block table that begins with the row, of blocks a multiple of {GRAIN} wide")
        if not reasons and needs.key_ranges is None:
            reasons.append(STRETCHES)
        return reasons

    def runs(self, needs: Needs) -> str:
        passes = [name for part, name in PASSES.items() if part in needs.sums]
        card = architecture(_device(needs))
        tuned = bool(table().get(card))
        if needs.tensors:
            tuned = tiles(ROWS, max(x.shape[-1] for x in needs.tensors), 1, needs.tensors[0]).tuned
        sizes = f"block sizes tuned for {card}" if tuned else "block sizes that are safe, and not tuned"
        rows = "weigh_rows" if needs.weighed else "attend_rows"
        return f"{rows}{''.join(f', {name}' for name in passes)}, and attend_step for one query; {sizes}"

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return through(lambda plain: _compute(plain, q, k, v), job, q, k, v), None


def _device(needs: Needs) -> torch.device:
    """That of the call; where none is known, the likely one."""
    return needs.tensors[0].device if needs.tensors else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _compute(job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    needs = job.needs or Needs(call=job.call)
    if q.shape[2] == 1 and not needs.gradients and (keys := one_query.seen(job.call, needs, k)) is not None:
        return _one_query(job, keys, q, k, v)
    return _answered(job, q, padded(k), padded(v))


def _sink(job: AttentionCall) -> Tensor | None:
    return None if job.sink is None else job.sink.float().reshape(-1).contiguous()


def _form(job: AttentionCall) -> dict[str, Any]:
    return {} if (how := weighing(job)) is None else vars(how)


def _one_query(job: AttentionCall, keys: one_query.Keys, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from heedful.gpu.launch import Step
    from heedful.gpu.operators import step

    flat = isinstance(k, Ragged) and isinstance(v, Ragged) and k.counts == v.counts
    k, v = (x.flat if flat and isinstance(x, Ragged) else padded(x) for x in (k, v))
    problem = Step(
        q, k, v, keys.ends, job.call.scale, len(job.call.keys), keys.longest, job.call.softcap, job.bias, _sink(job),
        keys.places, keys.base if flat else None, job.accumulator is not None, **_form(job),
    )  # fmt: skip
    heads, weights = step(problem)
    if job.accumulator is not None and weights is not None:
        is_text = job.call.queries.is_filled
        weights = weights if is_text is None else weights * is_text
        job.accumulator.whole = of_weights(weights, job.accumulator)
    return heads


def _answered(job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from heedful.gpu.launch import Problem
    from heedful.gpu.operators import ONCE, attend

    call, accumulator = job.call, job.accumulator
    if job.needs is None or (found := job.needs.key_ranges) is None:
        raise BackendError("the Triton kernel was not asked if it can serve")
    ranges = found.expand(-1, -1, q.shape[2], -1, -1).to(torch.int32).contiguous()
    asked = frozenset[str]() if accumulator is None else accumulator.requested
    table = call.mask.blocks[0] if call.mask.blocks else None
    one = q.shape[2] == 1 and table is None  # the weights themselves are no more than a summary
    answer = attend(Problem(
        q, k, v, ranges, call.scale, softcap=call.softcap, bias=job.bias, sink=_sink(job),
        table=None if table is None else table.table.to(torch.uint8).contiguous(),
        block=0 if table is None else table.size,
        is_text=None if call.queries.is_filled is None else call.queries.is_filled[:, 0].to(torch.uint8).contiguous(),
        received="received" in asked or (one and accumulator is not None),
        **({} if one or accumulator is None else _more(accumulator, call, len(q))), **_form(job),
    ))  # fmt: skip
    if accumulator is not None and one and answer.received is not None:
        accumulator.whole = of_weights(answer.received, accumulator)
    elif accumulator is not None:
        place = None if answer.place is None else answer.place.long()
        accumulator.whole = Summary(
            received=answer.received, seen=_seen(answer.received, call, ranges),
            entropy=answer.entropy, peak=answer.peak, place=place, first=answer.first, distance=answer.distance,
            carried=answer.carried, nearest=accumulator.nearest if "distance" in asked else 0,
        )  # fmt: skip
    for x in (answer.out, answer.received):
        if x is not None and x.requires_grad:
            x.register_hook(lambda given: _once(ONCE))
    return answer.out


def _once(rule: str) -> None:
    if torch.is_grad_enabled():
        raise BackendError(f"{rule}; attach with backend='tiled'")


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
