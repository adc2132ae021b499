"""What moving weight between columns (`core.reweight`) does to a call, for backends that do not hold the whole map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.reweight import Reweight
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.engine.attend import biased, grouped
from heedful.engine.attention_call import AttentionCall
from heedful.engine.precision import wide
from heedful.engine.stages import reweight_of

MOST = 256  # columns that are set right one by one; where more are touched, tiles are cheaper
STEEP = 8.0  # what is left of a row may be so much smaller than all of it before its rounding errors tell


def resolved(job: AttentionCall, first: Callable[[AttentionCall], object]) -> AttentionCall:
    """The job with what its reweightings do: each is told the summary of the pattern so far, from a pass of its own."""
    for step in job.plan.reweights:
        summary = Summary()
        if step.edit.sums:
            accumulator = SummaryAccumulator(frozenset(step.edit.sums), job.call)
            with torch.no_grad():
                first(replace(job, plan=job.plan.before(step), accumulator=accumulator, dropout=0.0))
            summary = accumulator.summary()
        job = replace(job, reweights={**job.reweights, step: reweight_of(step, job, summary)})
    return job


Rows = Callable[[AttentionCall, slice], Tensor]


def corrected(
    job: AttentionCall,
    tensors: tuple[Tensor, Tensor, Tensor],
    kernel: Callable[[AttentionCall], Tensor],
    exact: Rows,
    rows: int,
) -> Tensor:
    """Heads after the one reweighting of a job, from a kernel that shows no weights.

    The kernel's heads are those of the pattern as it was. What a reweighting adds to them needs the weights of the
    columns that it touches, and these are few. `exact` computes rows in which too little of the weight is left for
    that.
    """
    (step,) = job.plan.reweights
    accumulator = SummaryAccumulator(frozenset({*step.edit.sums, "place"}), job.call)
    plain = kernel(replace(job, accumulator=accumulator))
    summary = accumulator.summary()
    reweight = reweight_of(step, job, summary.only(step.edit.sums))
    columns = None if reweight is None else reweight.touched
    if reweight is None or columns is None or not len(columns):
        job.run_state.watch(step, plain, plain)
        return plain
    job = replace(job, reweights={step: reweight})
    total = plain.shape[2]
    if len(columns) > MOST:
        blocks = (slice(start, min(start + rows, total)) for start in range(0, total, rows))
        return torch.cat([exact(job, block) for block in blocks], 2)
    out = torch.empty_like(plain)
    q, k, v = (wide(x) for x in tensors)
    k, v = k[:, :, columns], v[:, :, columns]
    level = _level(q, wide(tensors[1]), job, summary)
    for start in range(0, total, rows):
        block = slice(start, min(start + rows, total))
        found = _moved(job, reweight, columns, block, (q[:, :, block], k, v), level[:, :, block], plain[:, :, block])
        out[:, :, block] = exact(job, block) if found is None else found
    job.run_state.watch(step, plain, out)
    return out


def _level(q: Tensor, k: Tensor, job: AttentionCall, summary: Summary) -> Tensor:
    """Each row's log-sum-exp of its scores `[b h q]`, from its highest weight and where that lies."""
    if summary.peak is None or summary.place is None:
        raise ValueError("the summary must hold the place of each row's highest weight")
    b, h, n = summary.place.shape
    place = summary.place.reshape(b, k.shape[1], -1)
    best = k.gather(2, place[..., None].expand(-1, -1, -1, k.shape[3])).view(b, h, n, -1)
    score = job.call.capped(torch.linalg.vecdot(q, best) * job.call.scale)
    if job.bias is not None:
        score = score + job.bias.to(score.dtype).expand(b, h, n, -1).gather(3, summary.place[..., None])[..., 0]
    return score - summary.peak.log()


def _moved(
    job: AttentionCall,
    reweight: Reweight,
    columns: Tensor,
    block: slice,
    tensors: tuple[Tensor, ...],
    level: Tensor,
    plain: Tensor,
) -> Tensor | None:
    """A block's heads after the reweighting; None where some row must be computed anew."""
    q, k, v = tensors
    scores = biased(job.call.capped(grouped(q, k.mT) * job.call.scale), job, block, columns)
    weights = (scores - level[..., None]).exp()  # [b h r c]
    keep = job.call.mask.keeps(job.call.tile(block, columns).pairs)
    if keep is not None:
        weights = weights.masked_fill(~keep, 0.0)
    sees = (level < float("inf"))[..., None]
    whole = sees.to(weights.dtype)  # the row's sum, and 0 where a row may see nothing
    if job.sink is not None:
        sink = job.sink if job.sink.shape[-2] == 1 else job.sink[..., block, :]
        whole = whole - (wide(sink) - level[..., None]).exp()
        if bool((sees & (whole * STEEP < 1)).any()):
            return None
    kept, free, given, aim = reweight.parts(weights, columns, whole)
    left = whole - weights.sum(-1, keepdim=True) + given  # with what columns that are not touched have
    scale = torch.where(whole > 0, aim / left, 1.0)
    if not bool(((scale <= STEEP) & (scale >= 0)).all()):
        return None
    restored = kept * scale if free is None else torch.where(free, kept * scale, kept)
    return scale * plain + grouped(restored - scale * weights, v)
