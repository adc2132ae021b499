"""What kernels that hold no map share: why they refuse a call, and the parts of a summary that they need not add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.key_ranges import counts
from heedful.core.positions import spread_heads
from heedful.core.sites import Site
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.core.weighing import Weighing
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import TRANSFORMED, Needs
from heedful.engine.reweighting import corrected
from heedful.engine.stages import weighing_of


def kept_back(needs: Needs) -> list[str]:
    """Every reason against a kernel that shows no weights and goes by columns."""
    reasons = [f"{step} needs the scores or weights, which this kernel keeps to itself" for step in needs.map_steps]
    if needs.reweights and (after := needs.reweights[1:] + needs.sum_steps):
        reasons.append(f"{after[0]} needs the weights after {needs.reweights[0]}, and those are never made here")
    for there, what in (
        (needs.dropout, "dropout is on"),
        (needs.pattern, "the whole pattern was asked for (output_attentions)"),
        (needs.sinks_by_row, "the model has a sink logit for each row"),
        (needs.weighed and needs.sink, "the model has sink logits, which only softmax knows"),
        (needs.transformed, TRANSFORMED),
    ):
        if there:
            reasons.append(f"{what}, which this kernel cannot serve")
    if needs.weighed and needs.reweights:
        reasons.append(f"{needs.weighed[0]} leaves rows without a sum for {needs.reweights[0]} to restore")
    if needs.gradients and (beyond := needs.learned_sums - {"received"}):
        told = ", ".join(sorted(beyond))
        reasons.append(
            f"gradients are wanted of {told}, and of what it adds up this kernel gives those of received alone"
        )
    if needs.call is not None and needs.sums & {"first", "distance"} and needs.call.keys.pads is None:
        reasons.append("several texts stand in one row, or keys were dropped, and it tells places by columns")
    return reasons


Rows = Callable[[AttentionCall], Tensor]


def through(compute: Rows, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads by way of a kernel, set right where weight is moved between columns."""
    if not job.plan.reweights:
        return compute(job)
    tiles = Tiled()
    height = tiles.tile_rows(q.shape[0], q.shape[1], k.shape[2])
    return corrected(job, (q, k, v), compute, lambda known, block: tiles.block(known, block, q, k, v), height)


def weighing(job: AttentionCall) -> Weighing | None:
    """What each weight is of its score, where it is no softmax of its row."""
    return next((weighing_of(step, job, job.call) for step in job.plan.at(Site.NORMALISE)), None)


def first_columns(call: Call, texts: int) -> Tensor:
    """The column of each text's first token `[b]`, -1 where it is not there."""
    start = (call.k_pos[:, 0] == 0).expand(texts, -1)
    return torch.where(start.any(-1), start.long().argmax(-1), -1).to(torch.int32).contiguous()


def lag(call: Call) -> int:
    """How far behind the first key the first query stands."""
    return int(call.queries.index[0, 0, 0] - call.keys.index[0, 0, 0])


STRETCHES = "some query's keys lie in too many separate stretches"


def of_weights(weights: Tensor, accumulator: SummaryAccumulator) -> Summary:
    """The summary of one query for each head, whose weights `[b h k]` are no larger than it."""
    call = accumulator.call.tile(slice(0, 1), slice(0, weights.shape[-1]))
    whole = accumulator.fresh()
    keep = call.mask.keeps(call.pairs)
    whole.add(weights[..., None, :], None, replace(call, keep=keep))
    return whole.summary()


def seen_by(call: Call, ranges: Tensor, keys: int) -> Tensor:
    """How many text queries see each key, `[b|1 h|1 k]`, from where ranges begin and end."""
    is_text = call.is_text[..., None].to(torch.float32)
    ranges, is_text = torch.broadcast_tensors(ranges, is_text[..., None])
    is_text = is_text[..., 0]
    if not call.mask.blocks:
        return counts(ranges, is_text, keys)
    (blocks,) = call.mask.blocks
    heads = call.heads
    table = spread_heads(blocks.table, heads).float().repeat_interleave(blocks.size, -1)[..., :keys]
    table = table if table.shape[1] in (1, heads) else table.repeat_interleave(heads // table.shape[1], 1)
    out = torch.zeros((), device=ranges.device)
    for i, start in enumerate(range(0, len(call.queries), blocks.size)):
        rows = slice(start, start + blocks.size)
        out = out + counts(ranges[:, :, rows], is_text[:, :, rows], keys) * table[:, :, i]
    return out
