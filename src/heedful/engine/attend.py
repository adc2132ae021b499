"""One attention call under a plan: the stages in the order of the sites."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call, Entries
from heedful.core.errors import SiteError
from heedful.core.mask import Mask
from heedful.core.shift import Shift
from heedful.core.sites import Site
from heedful.core.stack import Step
from heedful.core.summary import Summary, Tally
from heedful.core.values import replace
from heedful.engine.book import Book, Plan
from heedful.engine.needs import Needs


@dataclass(frozen=True, eq=False)
class Job:
    """One call and everything the model says about it that is not a method's business."""

    plan: Plan
    book: Book
    call: Call
    bias: Tensor | None = None  # [b|1, h|1, q|1, k], added to scores
    sink: Tensor | None = None  # [b|1, h, q|1, 1], a logit without key or value
    dropout: float = 0.0
    keep_pattern: bool = False  # the caller wants the whole pattern back
    tally: Tally | None = None  # what the call's pattern adds up to, where some step wants to know
    needs: Needs | None = None  # what the backend was chosen by
    shifts: Mapping[Step, Shift | None] = field(default_factory=dict)  # those known already


def _kv_heads(heads: tuple[int, ...], call: Call, step: Step) -> list[int]:
    """The key heads whose query heads are all chosen; a group chosen in part is an error."""
    size = call.heads // call.kv_heads
    groups = sorted({i // size for i in heads})
    if len(groups) * size != len(heads):
        raise SiteError(
            f"{step}, layer {call.layer}: {step.edit.site.name} is shared by groups of {size} heads, so heads must "
            f"name whole groups, for example heads={list(range(size))}"
        )
    return groups


def _chosen(step: Step, call: Call) -> list[int] | None:
    heads = step.heads
    if heads is None:
        return None
    if heads[-1] >= call.heads:
        raise SiteError(f"{step}, layer {call.layer}: heads must be below {call.heads}, for example heads=[0]")
    return _kv_heads(heads, call, step) if step.edit.site in (Site.KEY, Site.VALUE, Site.CACHE) else list(heads)


def stage(site: Site, x: Any, job: Job, call: Call) -> Any:
    """The value of a site after every step that acts there."""
    for step in job.plan.tiles(site):
        seen = job.book.view(step, call)
        act = getattr(step.method, step.edit.name)
        chosen = _chosen(step, call)
        if step.edit.reads:
            if isinstance(x, Mask):
                chosen = None  # rules speak of all heads
            if chosen is not None:
                seen = replace(seen, heads=len(chosen))
            job.book.note(step, call, act(x if chosen is None else x[:, chosen], seen))
            continue
        if step.edit.shifts:
            x = _shifted(step, x, job, call)
            continue
        tensor = isinstance(x, Tensor)
        version = None if not tensor or x.is_inference() else x._version
        # inference tensors count no versions: such a step is compared with a copy until it was seen to be clean
        copied = x.clone() if tensor and version is None and step not in job.book.clean else None
        new = act(x, seen)
        if copied is not None:
            job.book.clean.add(step)
        dirty = version != x._version if version is not None else copied is not None and not _alike(x, copied)
        if dirty:
            raise SiteError(f"{step}, layer {call.layer}: changed its input in place; return a new tensor instead")
        if isinstance(x, Mask):
            narrowed = _narrowed(step, x, new, chosen, call.heads)
            job.book.offered[step] += 1
            if step not in job.book.changed and narrows(replace(call, mask=narrowed), x):
                job.book.changed.add(step)
            x = narrowed
            continue
        if not isinstance(new, Tensor) or new.shape != x.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise SiteError(
                f"{step}, layer {call.layer}: must return a tensor of shape {site.shape} = {tuple(x.shape)}, got {got}"
            )
        if chosen is not None:
            merged = x.clone()
            merged[:, chosen] = new[:, chosen].to(x.dtype)
            new = merged
        job.book.watch(step, x, new)
        x = new.to(x.dtype)
    return x


def _alike(a: Tensor, b: Tensor) -> bool:
    """Equal, where no number equals itself."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _shifted(step: Step, weights: Tensor, job: Job, call: Call) -> Tensor:
    """A tile's weights after a shift. One that is not known yet is asked for here: the tile is the whole map."""
    if step in job.shifts:
        shift = job.shifts[step]
    else:
        tally = Tally(frozenset(step.edit.sums), job.call)
        tally.add(weights, None, call)
        shift = shift_of(step, job, tally.summary())
    new = weights if shift is None else shift.of(weights, call.cols)
    job.book.watch(step, weights, new)
    return new


def _broadcasts(x: Tensor, shape: tuple[int, int, int]) -> bool:
    b, h, k = shape
    return x.dim() == 3 and x.shape[0] in (1, b) and x.shape[1] in (1, h) and x.shape[2] == k


def shift_of(step: Step, job: Job, summary: Summary) -> Shift | None:
    """What a step does to the pattern that the summary is of."""
    call = job.call
    found = getattr(step.method, step.edit.name)(summary, job.book.view(step, call))
    if found is None:
        return None
    shape = (1 if call.query is None else len(call.query), call.heads, len(call.keys))
    for x in (found.factor, found.free) if isinstance(found, Shift) else ():
        if x is not None and not _broadcasts(x, shape):
            raise SiteError(
                f"{step}, layer {call.layer}: a Shift's tensors are [b|1, h|1, k] = {shape}, got {tuple(x.shape)}"
            )
    if not isinstance(found, Shift):
        raise SiteError(f"{step}, layer {call.layer}: must return a Shift or None, got {type(found).__name__}")
    chosen = _chosen(step, call)
    return found if chosen is None else found.on(chosen, call.heads)


def _narrowed(step: Step, old: Mask, new: object, chosen: list[int] | None, heads: int) -> Mask:
    if not isinstance(new, Mask) or new.rules[: len(old.rules)] != old.rules:
        raise SiteError(f"{step}: must return the mask it was given, narrowed, as in `return mask & Window(256)`")
    if chosen is None:
        return new
    return Mask(old.rules + tuple(rule.on(tuple(chosen), heads) for rule in new.rules[len(old.rules) :]))


def softmax(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax in at least float32; a sink logit takes its share and is dropped."""
    if sink is not None:
        width = scores.shape[-1]
        scores = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
        return torch.softmax(scores, -1)[..., :width]
    return torch.softmax(scores, -1)


def grouped(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` where `a [b h . .]` may have several heads for each of `b [b g . .]`; b is never expanded."""
    h, g = a.shape[1], b.shape[1]
    if h == g:
        return a @ b
    out = a.reshape(a.shape[0], g, h // g * a.shape[2], a.shape[3]) @ b
    return out.view(a.shape[0], h, a.shape[2], b.shape[3])


def _hide(scores: Tensor, keep: Tensor) -> bool:
    """Scores of pairs that are not computed become the least number, in place and only where there are such pairs.

    Whether some query may see nothing.
    """
    columns = keep.flatten(0, -2).all(0).logical_not_().nonzero()[:, 0].tolist()
    if columns:
        lo, hi = columns[0], columns[-1] + 1
        scores[..., lo:hi].masked_fill_(~keep[..., lo:hi], torch.finfo(scores.dtype).min)
    # a column that all queries see leaves none of them blind
    return len(columns) == keep.shape[-1] and not bool(keep.any(-1).all())


def tile(job: Job, call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Heads and pattern of the query rows and key columns that `call` names. This is what attention *is* here."""
    scores = grouped(q, k.mT).mul_(call.scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if job.bias is not None:
        rows = call.rows if job.bias.shape[-2] != 1 else slice(None)
        scores = scores + job.bias[..., rows, :][..., call.cols].to(scores.dtype)
    scores = stage(Site.SCORES, scores, job, call)
    keep, blind = call.keep, False
    if keep is not None:
        scores = scores.clone() if job.plan.at(Site.SCORES) else scores
        blind = _hide(scores, keep)
    sink = job.sink if job.sink is None or job.sink.shape[-2] == 1 else job.sink[..., call.rows, :]
    weights = softmax(scores, sink)
    for step in job.plan.at(Site.NORMALISE):
        weights = _normalised(step, scores, weights, job, call)
    if keep is not None and (blind or job.plan.edits(Site.SCORES, Site.NORMALISE)):
        # an exact zero already, but for queries that may see nothing, and for what a method did: one that hides all
        # that a query may see would leave the weight to the rest
        weights = weights.masked_fill(~keep, 0.0)
    weights = stage(Site.PATTERN, weights, job, call)
    if keep is not None and job.plan.edits(Site.PATTERN):
        weights = weights.masked_fill(~keep, 0.0)
    if job.tally is not None:
        plain = not job.plan.edits(Site.NORMALISE, Site.PATTERN)
        job.tally.add(weights, scores if plain else None, call)
    if job.dropout:
        weights = torch.nn.functional.dropout(weights, job.dropout)
    return grouped(weights.to(v.dtype), v), weights


def _normalised(step: Step, scores: Tensor, weights: Tensor, job: Job, call: Call) -> Tensor:
    if step.edit.reads:
        raise SiteError(f"{step}: NORMALISE has nothing to read that PATTERN has not; use @reads(Site.PATTERN)")
    if job.sink is not None:
        raise SiteError(f"{step}, layer {call.layer}: the model has learned sink logits, which only softmax knows")
    new = getattr(step.method, step.edit.name)(scores, job.book.view(step, call))
    if not isinstance(new, Tensor) or new.shape != scores.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise SiteError(f"{step}, layer {call.layer}: must return weights of shape {tuple(scores.shape)}, got {got}")
    if step.heads is not None:
        chosen = _chosen(step, call)
        merged = weights.clone()
        merged[:, chosen] = new[:, chosen]
        new = merged
    job.book.watch(step, weights, new)
    return new


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


Compute = Callable[[Job, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Choose = Callable[[Needs], Compute]


def attend(job: Job, q: Tensor, k: Tensor, v: Tensor, choose: Choose) -> tuple[Tensor, Tensor | None, Call]:
    """Heads `[b h q d]` of one call, its pattern if that was asked for, and the call as CACHE steps should see it."""
    call, book = job.call, job.book
    q = stage(Site.QUERY, q, job, call)
    k = stage(Site.KEY, k, job, call)
    v = stage(Site.VALUE, v, job, call)
    call = replace(call, query=q, key=k, value=v)
    mask = stage(Site.MASK, call.mask, job, call)
    if mask is not call.mask:
        call = replace(call, mask=mask)
    wanted = job.plan.wanted
    carries = _carries(job, call)
    carry = torch.cat(list(carries.values()), -1) if carries else None
    needs = replace(
        job.plan.needs, softcap=call.softcap is not None, sink=job.sink is not None, pattern=job.keep_pattern,
        bias=job.bias is not None, dropout=job.dropout > 0, call=call, tensors=(q, k, v), learned=_learned(job),
    )  # fmt: skip
    job = replace(job, call=call, tally=Tally(wanted, call, carry) if wanted else None, needs=needs)
    pattern = None
    if mixes := job.plan.at(Site.MIX):
        heads = _mixed(mixes[0], job, q, k, v)
    else:
        heads, pattern = choose(needs)(job, q, k, v)
    if job.tally is not None:
        _sum_up(job, job.tally, carries)
    heads = stage(Site.HEADS, heads.to(v.dtype), job, call)
    book.remember(call)
    book.look_for_nan(heads)
    return heads, pattern, call


def _learned(job: Job) -> tuple[Tensor, ...]:
    """What the weights depend on beside queries and keys, where a kernel could serve them."""
    sink = () if job.sink is None else (job.sink,)
    found = (job.book.params.get((step.number, job.call.layer), {}).values() for step in job.plan.shifts)
    return (*sink, *itertools.chain.from_iterable(found))


def _carries(job: Job, call: Call) -> dict[int, Tensor]:
    """The columns that parts want the weights multiplied with."""
    found = {}
    for step in job.plan.summed:
        if "carried" in step.edit.sums:
            columns = step.method.carries(job.book.view(step, call))
            if columns is not None:
                found[step.number] = columns
    return found


def _sum_up(job: Job, tally: Tally, carries: dict[int, Tensor]) -> None:
    """Hand the summary of the whole call to the steps that read it."""
    whole = tally.summary()
    ends = dict(zip(carries, itertools.accumulate(x.shape[-1] for x in carries.values()), strict=True))
    for step in job.plan.summed:
        mine = slice(ends[n] - carries[n].shape[-1], ends[n]) if (n := step.number) in ends else slice(0)
        summary = replace(whole, carried=None if whole.carried is None else whole.carried[..., mine])
        # what feeds an edit of the same method sees every head, as that edit does
        chosen = _chosen(step, job.call) if all(edit.reads for edit in step.method.edits) else None
        seen = job.book.view(step, job.call)
        if chosen is not None:
            seen = replace(seen, heads=len(chosen))
        act = getattr(step.method, step.edit.name)
        job.book.note(step, job.call, act(summary if chosen is None else summary.on(chosen), seen))


def _mixed(step: Step, job: Job, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = job.call
    if job.bias is not None or job.sink is not None or call.softcap is not None or not call.mask.plain:
        raise SiteError(
            f"{step}, layer {call.layer}: a mechanism without a map can honour causality and padding only; this layer "
            "has a bias, a soft cap, sink logits or a narrower mask; restrict the method with .on(layers=...)"
        )
    heads = getattr(step.method, step.edit.name)((q, k, v), job.book.view(step, call))
    want = (*q.shape[:3], v.shape[-1])
    if not isinstance(heads, Tensor) or heads.shape != want:
        got = tuple(heads.shape) if isinstance(heads, Tensor) else type(heads).__name__
        raise SiteError(f"{step}, layer {call.layer}: must return heads of shape {want}, got {got}")
    job.book.offered[step] += 1
    job.book.changed.add(step)
    return heads


def narrows(call: Call, before: Mask, rows: int = 128) -> bool:
    """Whether the call's mask drops a pair that `before` kept."""
    if call.mask is before:
        return False
    for start in range(0, len(call.queries), rows):
        part = call.tile(slice(start, min(start + rows, len(call.queries))), slice(0, len(call.keys)))
        new = call.mask.keeps(part.pairs)
        if new is None:
            return False
        old = before.keeps(part.pairs)
        lost = ~new if old is None else old & ~new
        if bool(lost.any()):
            return True
    return False


def keep_entries(job: Job, entries: Entries) -> Tensor | None:
    """Which cache entries the CACHE steps keep, `[b g k]`; None when no step acts there."""
    steps = job.plan.at(Site.CACHE)
    if not steps:
        return None
    kept, padding = entries.valid, job.call.mask.padding
    live = None if padding is None else padding.at(entries.places.index)
    for step in steps:
        seen = job.book.view(step, job.call)
        mine = replace(entries, notes=seen.notes, live=live)
        new = getattr(step.method, step.edit.name)(mine, seen)
        if not isinstance(new, Tensor) or new.dtype != torch.bool or new.shape != kept.shape:
            got = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise SiteError(
                f"{step}, layer {job.call.layer}: must return which entries stay, bool of shape {tuple(kept.shape)}, "
                f"got {got}"
            )
        chosen = _chosen(step, job.call)
        if chosen is not None:
            merged = torch.ones_like(kept)
            merged[:, chosen] = new[:, chosen]
            new = merged
        narrowed = kept & new
        job.book.watch(step, kept, narrowed)
        kept = narrowed
    return kept
