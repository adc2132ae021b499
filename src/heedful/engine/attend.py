"""One attention call under a plan: the stages in the order of the sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import reduce
from math import frexp, gcd
from operator import add
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import SiteError, shape_of
from heedful.core.flags import left_out, lowered, traced, zeroed
from heedful.core.method import Step
from heedful.core.sites import MAP_SITES, Site
from heedful.core.summary import SummaryAccumulator
from heedful.core.values import replace
from heedful.engine.attention_call import AttentionCall
from heedful.engine.distances import diagonals, laid
from heedful.engine.earlier import with_earlier
from heedful.engine.needs import Needs, tilewise
from heedful.engine.plan import Plan
from heedful.engine.precision import mixed, unmixed, wide, widened
from heedful.engine.stages import (
    added,
    at_distances,
    chosen_heads,
    in_heads,
    in_these,
    own_rows,
    stage,
    staged,
    weighing_of,
)
from heedful.engine.untouched import Untouched

SHARED_ROWS = 64  # of a product, from which on threads share it
FIRST_ROWS = 128  # of a tile for those who read a pattern's first rows


def softmax(scores: Tensor, sink: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Softmax in at least float32; a sink logit takes its share and is dropped."""
    if sink is not None:
        width = scores.shape[-1]
        scores = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        return torch.softmax(scores, -1)[..., :width]
    return torch.softmax(scores, -1, out=out)


def grouped(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a @ b` where `a [b h . .]` may have several heads for each of `b [b g . .]`; b is never expanded."""
    texts, h, rows, d = a.shape
    group = h // b.shape[1]
    each, width = texts * b.shape[1], b.shape[3]
    given = None if out is None else out.view(each, group * rows, width)
    a, b = a.reshape(each, group * rows, d), b.reshape(each, *b.shape[2:])
    found = torch.bmm(a, b) if given is None else _shared_out(a, b, given)
    return found.view(texts, h, rows, width)


def _shared_out(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`torch.bmm`, which on a CPU gives each thread whole matrices: the rows of those left over are divided."""
    many, rows = len(a), a.shape[1]
    parts = gcd(threads := torch.get_num_threads(), rows)
    even = many - many % threads
    if a.device.type != "cpu" or even == many or parts == 1 or rows < SHARED_ROWS:
        return torch.bmm(a, b, out=out)
    if even:
        torch.bmm(a[:even], b[:even], out=out[:even])
    for x, y, to in zip(a[even:], b[even:], out[even:], strict=True):
        torch.bmm(x.unflatten(0, (parts, -1)), y.expand(parts, *y.shape), out=to.unflatten(0, (parts, -1)))
    return out


def _bias(job: AttentionCall, rows: slice, cols: slice | Tensor) -> Tensor | None:
    """What the model adds to the scores of some rows and columns."""
    if job.bias is None:
        return None
    if job.diagonal:
        start, stop, _ = rows.indices(len(job.call.queries))
        last, keys = len(job.call.queries) - stop, len(job.call.keys)
        return laid(job.bias[:, :, 0, last : last + stop - start + keys - 1], keys)[..., cols]
    return (job.bias if job.bias.shape[-2] == 1 else job.bias[..., rows, :])[..., cols]


def biased(scores: Tensor, job: AttentionCall, rows: slice, cols: slice | Tensor) -> Tensor:
    """Scores of some rows and columns with what the model adds to them."""
    bias = _bias(job, rows, cols)
    return scores if bias is None else scores + bias.to(scores.dtype)


def gained(job: AttentionCall, call: Call, like: Tensor) -> Tensor | None:
    """What a tile's scores gain from the model, and from steps that do nothing but add; of the type of `like`.

    It is `[b|1 h|1 r|1 k]`.
    """
    bias = _bias(job, call.rows, call.cols)
    total = None if bias is None else bias.to(like.dtype)
    shape = (len(like), call.heads, len(call.queries), len(call.keys))
    for step in job.plan.tiles(Site.SCORES):
        more = added(step, job, call, shape, like.dtype)
        if more is not None:
            total = more if total is None else total + more
    return total if total is None else total.expand(*total.shape[:3], shape[3])


def gained_by_distance(job: AttentionCall) -> Tensor | None:
    """What the `diagonals` of a call gain, `[1 h|1 1 m]` in float32; None where something else is added."""
    steps, call = job.plan.tiles(Site.SCORES), job.call
    if not steps or not all(step.edit.by_distance for step in steps) or (far := diagonals(call)) is None:
        return None
    found = (at_distances(step, job, call, far) for step in steps)
    gains = (in_heads(step, job, call, x[None, :, None].float()) for step, x in zip(steps, found, strict=True))
    return reduce(add, gains)


def tile(job: AttentionCall, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads and pattern of the query rows and key columns that `call` names. This is what attention *is* here."""
    # after the product, as models do it: the same bits as theirs; powers of two round nothing, and spare the map a pass
    early = frexp(call.scale)[0] == 0.5
    scores = grouped(q * call.scale if early else q, k.mT, job.lent("scores", (*q.shape[:3], k.shape[2]), q))
    scores = call.capped(scores if early else scores.mul_(call.scale))
    scores = biased(scores, job, call.rows, call.cols)
    scores, call = staged(Site.SCORES, scores, job, call)
    keep, steps = call.keep, job.plan.at(Site.NORMALISE)
    near = None if keep is None else left_out(keep, scores)
    if keep is not None and near:
        # in place where no step has seen them
        scores = lowered(scores, keep, into=not job.plan.at(Site.SCORES), cut=bool(steps), near=near)
    sink = job.sink if job.sink is None or job.sink.shape[-2] == 1 else job.sink[..., call.rows, :]
    first = steps[0] if steps and steps[0].heads is None else None
    if first and (first.edit.weighs or first in job.run_state.changed):
        weights = scores  # no head has a softmax, and nobody asks any more whether the step changes it
    else:
        # one that a step is compared with is not learned through: what is computed again may do without
        weights = softmax(scores.detach() if first else scores, sink, job.lent("weights", scores.shape, scores))
    for step in steps:
        weights = _normalised(step, scores, weights, job, call)
    top = scores.detach().amax(-1) if near and not steps else None
    if keep is not None and near and (top is None or weights.requires_grad or not _above_hidden(top)):
        # what a step made is not changed in place; what learns passes nothing on to hidden pairs, not even no number
        weights = zeroed(weights, keep, into=not steps, near=near)
    weights = stage(Site.PATTERN, weights, job, call)
    if call.above:
        top = None if top is None else top[:, :, call.above :]
        scores, weights, call = scores[:, :, call.above :], weights[:, :, call.above :], own_rows(call)
    if job.accumulator is not None:
        plain = not job.plan.edits(Site.NORMALISE, Site.PATTERN)
        job.accumulator.add(weights, scores if plain else None, call, top)
    if job.dropout:
        weights = torch.nn.functional.dropout(weights, job.dropout)
    weights = weights.to(v.dtype)
    kept = None if job.spare is None else v.new_empty(*weights.shape[:3], v.shape[3])
    return grouped(weights, v, kept), weights


def _above_hidden(top: Tensor) -> bool:
    """Whether the highest score of every row is a number so far above hidden ones that softmax made zeros of these.

    It is not where a step, or the model, hid all that a query may see by numbers as low.
    """
    return not traced(top) and bool((top.abs() < torch.finfo(top.dtype).max / 2).all())


def _normalised(step: Step, scores: Tensor, weights: Tensor, job: AttentionCall, call: Call) -> Tensor:
    if step.edit.reads:
        raise SiteError(f"{step}: NORMALISE has nothing to read that PATTERN has not; use @reads(Site.PATTERN)")
    if job.sink is not None:
        raise step.fault(call, "the model has learned sink logits, which only softmax knows")
    if step.edit.weighs:
        new = weighing_of(step, job, call).of(scores, call.keep)
    else:
        with Untouched(step, job, scores):
            new = step.act(scores, job.run_state.view(step, call))
    if not isinstance(new, Tensor) or new.shape != scores.shape:
        want = tuple(scores.shape)
        raise step.fault(call, f"must return weights of shape {want}, got {shape_of(new)}")
    if step.heads is not None and (chosen := chosen_heads(step, call)) is not None:
        new = in_these(weights, new, chosen)
    job.run_state.watch(step, weights, new)
    return new


Compute = Callable[[AttentionCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Choose = Callable[[Needs], Compute]


def attend(job: AttentionCall, q: Tensor, k: Tensor, v: Tensor, choose: Choose) -> tuple[Tensor, Tensor | None, Call]:
    """Heads `[b h q d]` of one call, its pattern if that was asked for, and the call as CACHE steps should see it."""
    if mixed(q):
        with unmixed(q):
            job = replace(job, call=widened(job.call), bias=None if job.bias is None else wide(job.bias))
            heads, pattern, call = attend(job, wide(q), wide(k), wide(v), choose)
        return heads.to(v.dtype), pattern, call
    call, run_state = job.call, job.run_state
    plan = job.plan
    if Site.QUERY in plan.acts:
        q = staged(Site.QUERY, q, job, call)[0]
    if Site.KEY in plan.acts:
        k = staged(Site.KEY, k, job, call)[0]
    if Site.VALUE in plan.acts:
        v = staged(Site.VALUE, v, job, call)[0]
    call = replace(call, query=q, key=k, value=v, bias=job.bias)
    if Site.MASK in plan.acts:
        mask = staged(Site.MASK, call.mask, job, call)[0]
        if mask is not call.mask:
            call = replace(call, mask=mask, in_order=call.causal and not mask.causal)
    requested = plan.requested
    carries = _carries(job, call) if plan.summed else {}
    carry = torch.cat(list(carries.values()), -1) if carries else None
    needs = replace(
        plan.needs, softcap=call.softcap is not None, sink=job.sink is not None, pattern=job.keep_pattern,
        sinks_by_row=job.sink is not None and job.sink.numel() != call.heads,
        sink_learns=job.sink is not None and job.sink.requires_grad,
        bias=job.bias is not None, bias_learns=job.bias is not None and job.bias.requires_grad,
        dropout=job.dropout > 0, call=call, tensors=(q, k, v), learned=_learned(job),
    )  # fmt: skip
    learned = bool(needs.gradients and needs.learned_sums)
    accumulator = SummaryAccumulator(requested, call, carry, learned) if requested else None
    job = replace(job, call=call, accumulator=accumulator, needs=needs)
    pattern = None
    if Site.MIX in plan.acts:
        heads = _mixed(plan.at(Site.MIX)[0], job, q, k, v)
    else:
        longer, rows = with_earlier(job, q) if plan.above else (job, q)
        heads, pattern = choose(needs)(longer, rows, k, v)
    if needs.adds and not needs.transformed and heads.numel() and not bool(heads.detach().abs().amax().isfinite()):
        _require_numbers(job, q)
    if plan.apart:
        _first_rows(job, q, k, v)
    if job.accumulator is not None:
        _sum_up(job, job.accumulator, carries)
    heads = heads.to(v.dtype)
    if Site.HEAD_OUTPUT in plan.acts:
        heads = staged(Site.HEAD_OUTPUT, heads, job, call)[0]
    run_state.remember(call)
    run_state.look_for_nan(call.layer, heads)
    return heads, pattern, call


@torch.no_grad()
def _require_numbers(job: AttentionCall, like: Tensor) -> None:
    """Refuse what is added to scores and no number: looked for where heads are none, at no cost elsewhere."""
    call, steps = job.call, [step for step in job.plan.tiles(Site.SCORES) if step.edit.adds]
    for part, step in itertools.product(call.bands(FIRST_ROWS), steps):
        shape = (len(like), call.heads, len(part.queries), len(part.keys))
        found = added(step, job, part, shape, torch.float32)
        if found is not None and bool((odd := found.isnan() | (found == torch.inf)).any()):
            place = odd.nonzero()[0].tolist()
            rule = "that must be a number, or -inf where a pair is not to be seen, which is better left out at MASK"
            gain = float(found[tuple(place)])
            raise step.fault(call, f"scores gain {gain} at {place} of a tile [b h r k]; {rule}")


@torch.no_grad()
def _first_rows(job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Show the first rows of the pattern to those who want no more, computed for them alone."""
    call = job.call
    total = min(len(call.queries), max(s.first or 0 for s in job.plan.apart))
    edits = tuple(step for step in job.plan.steps if step.edit.site in MAP_SITES and tilewise(step))
    alone = replace(job, plan=Plan((*edits, *job.plan.apart)), accumulator=None, dropout=0.0)
    for start in range(0, total, FIRST_ROWS):  # the first ones of a causal text see few columns
        rows = slice(start, min(start + FIRST_ROWS, total))
        ranges = call.mask.columns(call.queries.take(rows), call.keys, rows)
        part = call.tile(rows, slice(0, ranges[-1][1] if ranges else 1))
        part = replace(part, keep=call.mask.keeps(part.pairs))
        # of values without a width: nobody wants these heads
        tile(alone, part, wide(q[:, :, rows]), wide(k[:, :, part.cols]), wide(v[:, :, part.cols, :0]))


def _learned(job: AttentionCall) -> tuple[Tensor, ...]:
    """What the weights depend on beside queries and keys."""
    found = [x for x in (job.sink, job.bias) if x is not None]
    for step in job.plan.learning:
        found += job.run_state.params.get((step.number, job.call.layer), {}).values()
    return tuple(found)


def _carries(job: AttentionCall, call: Call) -> dict[int, Tensor]:
    """The columns that parts want the weights multiplied with."""
    found = {}
    for step in job.plan.summed:
        if "carried" in step.edit.sums:
            columns = step.method.carries(job.run_state.view(step, call))
            if columns is not None:
                found[step.number] = columns
    return found


def _sum_up(job: AttentionCall, accumulator: SummaryAccumulator, carries: dict[int, Tensor]) -> None:
    """Hand the summary of the whole call to the steps that read it."""
    learned = accumulator.summary()
    plain = learned.detached()
    ends = dict(zip(carries, itertools.accumulate(x.shape[-1] for x in carries.values()), strict=True))
    for step in job.plan.summed:
        whole = learned if step.edit.loss else plain
        mine = slice(ends[n] - carries[n].shape[-1], ends[n]) if (n := step.number) in ends else slice(0)
        summary = replace(whole, carried=None if whole.carried is None else whole.carried[..., mine])
        # what feeds an edit of the same method sees every head, as that edit does
        chosen = chosen_heads(step, job.call) if all(edit.reads for edit in step.method.edits) else None
        seen = job.run_state.view(step, job.call)
        if chosen is not None:
            seen = replace(seen, heads=len(chosen))
        job.run_state.note(step, job.call, step.act(summary if chosen is None else summary.on(chosen), seen))


def _mixed(step: Step, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = job.call
    if job.bias is not None or job.sink is not None or call.softcap is not None or not call.mask.plain:
        raise _without_map(step, call)
    with Untouched(step, job, q, k, v):
        return _made(step, (q, k, v), (*q.shape[:3], v.shape[-1]), job, call)


def replaced(step: Step, job: AttentionCall, call: Call, output: Tensor) -> Tensor:
    """The block's output as a BLOCK edit makes it from the block's input."""
    if mixed(output):
        with unmixed(output):
            return replaced(step, job, widened(call), wide(output)).to(output.dtype)
    if call.hidden is None:
        raise step.fault(call, "the block is not handed hidden states [b n e]")
    if call.cross and not step.edit.before_rotary:
        what = "is handed the queries' sequence alone, so cross attention would ignore the other"
        raise step.fault(call, f"{what}; restrict the method to self attention with .on(layers=...)")
    if not call.mask.plain:
        raise _without_map(step, call)
    with Untouched(step, job, call.hidden):
        return _made(step, call.hidden, tuple(output.shape), job, call).to(output.dtype)


def _without_map(step: Step, call: Call) -> SiteError:
    rule = "a mechanism without a map can honour causality and padding only"
    has = "this layer has a bias, a soft cap, sink logits or a narrower mask"
    return step.fault(call, f"{rule}; {has}; restrict the method with .on(layers=...)")


def _made(step: Step, given: Any, want: tuple[int, ...], job: AttentionCall, call: Call) -> Tensor:
    """What a step that replaces a whole stretch of the call makes of what enters there."""
    made = step.act(given, job.run_state.view(step, call))
    if not isinstance(made, Tensor) or made.shape != want:
        raise step.fault(call, f"must return a tensor of shape {want}, got {shape_of(made)}")
    job.run_state.offered[step] += 1
    job.run_state.changed.add(step)
    return made
