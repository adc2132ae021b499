"""What the steps of a stack do to a site's value, one after another."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from heedful.core.call import CachedKV, Call, Kept, Merged
from heedful.core.errors import SiteError, shape_of
from heedful.core.flags import zeroed
from heedful.core.mask import Causal, Mask
from heedful.core.method import Step
from heedful.core.packed import Packing
from heedful.core.reweight import Reweight
from heedful.core.rules import OnHeads, Rule
from heedful.core.sites import Site
from heedful.core.summary import Summary, SummaryAccumulator
from heedful.core.values import replace
from heedful.core.weighing import Weighing
from heedful.engine.attention_call import AttentionCall
from heedful.engine.distances import by_distance
from heedful.engine.merging import merge
from heedful.engine.precision import mixed, unmixed, wide, widened
from heedful.engine.untouched import Untouched


def _kv_heads(heads: tuple[int, ...], call: Call, step: Step) -> list[int]:
    """The key heads whose query heads are all chosen; a group chosen in part is an error."""
    size = call.heads // call.kv_heads
    groups = sorted({i // size for i in heads})
    if len(groups) * size != len(heads):
        rule = f"{step.edit.site.name} is shared by groups of {size} heads, so heads must name whole groups"
        raise step.fault(call, f"{rule}, for example heads={list(range(size))}")
    return groups


def chosen_heads(step: Step, call: Call) -> list[int] | None:
    heads = step.heads
    if heads is None:
        return None
    if heads[-1] >= call.heads:
        raise step.fault(call, f"heads must be below {call.heads}, for example heads=[0]")
    return _kv_heads(heads, call, step) if step.edit.site in (Site.KEY, Site.VALUE, Site.CACHE) else list(heads)


def in_these(old: Tensor, new: Tensor, heads: list[int]) -> Tensor:
    """A tensor with some heads' part of another."""
    out = old.clone()
    out[:, heads] = new[:, heads].to(old.dtype)
    return out


def stage(site: Site, x: Any, job: AttentionCall, call: Call) -> Any:
    """The value of a site after every step that acts there."""
    if mixed(x):
        with unmixed(x):
            return staged(site, wide(x), job, widened(call))[0].to(x.dtype)
    return staged(site, x, job, call)[0]


def staged(site: Site, x: Any, job: AttentionCall, call: Call) -> tuple[Any, Call]:
    """The value of a site after every step that acts there, and the call without the pairs that the steps hid.

    A score of minus infinity says that a pair is not to be seen. It is told in `call.keep`, as a mask is, and leaves
    a finite score behind: the next step may add, multiply and convolve.
    """
    for step in job.plan.tiles(site):
        if step.edit.reads:
            x = _read(step, x, job, call)
        elif step.edit.reweights:
            x = _reweighted(step, x, job, call)
        elif isinstance(x, Mask):
            x = _narrowed(step, x, job, call)
        elif step.edit.adds:
            more = added(step, job, call, tuple(x.shape), x.dtype)
            x, call = (x, call) if more is None else _hidden(x, x + more, call)
        else:
            x, call = _edited(step, x, job, call)
    return x, call


def _hidden(old: Tensor, new: Tensor, call: Call) -> tuple[Tensor, Call]:
    """Scores that became minus infinity as they were, and the call without their pairs."""
    if not is_functorch_wrapped_tensor(new) and new.numel() and bool(new.detach().amin() > -torch.inf):
        return new, call
    hidden = new == -torch.inf
    hidden &= old > -torch.inf  # what overflowed before any step is a fault that is to be seen
    keep = ~hidden if call.keep is None else call.keep & ~hidden
    return torch.where(hidden, old.to(new.dtype), new), replace(call, keep=keep)


def own_rows(call: Call) -> Call:
    """A tile without the rows that are only there to be looked at."""
    if not call.above:
        return call
    own = slice(call.above, None)
    keep = call.keep if call.keep is None or call.keep.shape[-2] == 1 else call.keep[..., own, :]
    start, stop = (call.rows.start or 0) + call.above - call.earlier, call.rows.stop - call.earlier
    return replace(call, queries=call.queries.take(own), rows=slice(start, stop), keep=keep, above=0, earlier=0)


def _top(call: Call, rows: int) -> Call:
    """A tile's first rows."""
    keep = call.keep if call.keep is None or call.keep.shape[-2] == 1 else call.keep[..., :rows, :]
    start, top = call.rows.start or 0, slice(0, rows)
    stop = start + min(rows, len(call.queries))
    return replace(call, queries=call.queries.take(top), rows=slice(start, stop), keep=keep)


def _read(step: Step, x: Any, job: AttentionCall, call: Call) -> Any:
    """What a reader leaves: the value as it was, of which it has told."""
    seen, chosen = own_rows(job.run_state.view(step, call)), chosen_heads(step, call)
    if isinstance(x, Mask):
        chosen = None  # rules speak of all heads
    if chosen is not None:
        seen = replace(seen, heads=len(chosen))
    shown = wide(x) if isinstance(x, Tensor) else x  # sums over tokens soon leave what half precision holds
    mine = shown[:, :, call.above :] if call.above else shown
    if step.first is not None:
        left = step.first - (seen.rows.start or 0)
        if left <= 0:
            return x
        mine, seen = mine[:, :, :left], _top(seen, left)
    with Untouched(step, job, mine):
        found = step.act(mine if chosen is None else mine[:, chosen], seen)
    job.run_state.note(step, call, found)
    # the same numbers, and a reader that keeps its tensor has its gradient
    return shown.to(x.dtype) if shown is not x and shown.requires_grad else x


def _narrowed(step: Step, mask: Mask, job: AttentionCall, call: Call) -> Mask:
    """The mask that an edit makes of one."""
    chosen = chosen_heads(step, call)
    given = _given(step, mask, chosen, call.heads)
    new = step.act(given, job.run_state.view(step, call))
    redrawn = _redrawn(step, mask, given, new, chosen, call.heads)
    job.run_state.offered[step] += 1
    if step not in job.run_state.changed and redraws(replace(call, mask=redrawn), mask):
        job.run_state.changed.add(step)
    return redrawn


def _edited(step: Step, x: Tensor, job: AttentionCall, call: Call) -> tuple[Tensor, Call]:
    """The tensor that an edit makes of one, in the heads that it is for, and the call as the next step sees it."""
    chosen, site = chosen_heads(step, call), step.edit.site
    with Untouched(step, job, x):
        new = step.act(x, job.run_state.view(step, call))
    if isinstance(new, Merged):
        merges = merge(step, x, new, call, job.run_state.now.merges.get(call.lowest))
        job.run_state.merge(step, call, merges)
        places, told = merges.places, {"ids": None, "hidden": None, "rotate": None}  # of the tokens that there were
        return new.stream.to(x.dtype), replace(call, queries=places, keys=places, sizes=merges.sizes, **told)
    if not isinstance(new, Tensor) or new.shape != x.shape:
        raise step.fault(call, f"must return a tensor of shape {site.shape} = {tuple(x.shape)}, got {shape_of(new)}")
    if chosen is not None:
        new = in_these(x, new, chosen)
    job.run_state.watch(step, x, new)
    if site is Site.SCORES:
        new, call = _hidden(x, new, call)
    new = new.to(x.dtype)
    if site is Site.PATTERN and call.keep is not None:
        new = zeroed(new, call.keep)  # before the next step looks
    return new, call


def added(step: Step, job: AttentionCall, call: Call, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """What a step adds to a tile's scores of that shape `b h r k`, in the heads that it is for; None for nothing."""
    if step.edit.by_distance:
        found = by_distance(lambda far: at_distances(step, job, call, far), call)
    else:
        found = step.act(job.run_state.view(step, call))
    if found is None:
        job.run_state.offered[step] += 1
        return None
    if not isinstance(found, Tensor) or not _fits(found, shape):
        rule = f"must return what scores gain, [b|1, h|1, r|1, k|1] = {shape}, or None for nothing"
        raise step.fault(call, f"{rule}, got {shape_of(found)}")
    return in_heads(step, job, call, found.to(dtype))


def at_distances(step: Step, job: AttentionCall, call: Call, far: Tensor) -> Tensor:
    """What scores gain at distances `[m]`, as the step says it, `[h|1 m]`."""
    found = step.act(far, job.run_state.view(step, call))
    if not isinstance(found, Tensor) or found.shape not in {(h, len(far)) for h in (1, call.heads)}:
        rule = f"must return what scores gain at each distance, [h|1, m] = {(call.heads, len(far))}"
        raise step.fault(call, f"{rule}, got {shape_of(found)}")
    return found


def in_heads(step: Step, job: AttentionCall, call: Call, found: Tensor) -> Tensor:
    """What a step adds `[b|1 h|1 ...]`, in the heads that it is for."""
    chosen = chosen_heads(step, call)
    if chosen is not None:
        inside = torch.zeros(call.heads, 1, 1, dtype=torch.bool, device=found.device)
        inside[chosen] = True
        found = found.where(inside, 0.0)
    job.run_state.watch(step, found.new_zeros(()).expand(found.shape), found)
    return found


def _fits(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether it can be spread to that shape, axis by axis."""
    return x.dim() == len(shape) and all(n in (1, many) for n, many in zip(x.shape, shape, strict=True))


def _reweighted(step: Step, weights: Tensor, job: AttentionCall, call: Call) -> Tensor:
    """A tile's weights after a reweighting. One not known yet is asked for here, where the tile is the whole map."""
    if step in job.reweights:
        found = job.reweights[step]
    else:
        accumulator = SummaryAccumulator(frozenset(step.edit.sums), job.call)
        accumulator.add(weights, None, call)
        found = reweight_of(step, job, accumulator.summary())
    new = weights if found is None else found.of(weights, call.cols)
    job.run_state.watch(step, weights, new)
    return new


def reweight_of(step: Step, job: AttentionCall, summary: Summary) -> Reweight | None:
    """What a step does to the pattern that the summary is of."""
    call = job.call
    found = step.act(summary, job.run_state.view(step, call))
    if found is None:
        return None
    shape = (1 if call.query is None else len(call.query), call.heads, len(call.keys))
    for x in (found.factor, found.free) if isinstance(found, Reweight) else ():
        if x is not None and not (_fits(x, shape) and x.shape[2] == shape[2]):
            raise step.fault(call, f"a Reweight's tensors are [b|1, h|1, k] = {shape}, got {tuple(x.shape)}")
    if not isinstance(found, Reweight):
        raise step.fault(call, f"must return a Reweight or None, got {type(found).__name__}")
    chosen = chosen_heads(step, call)
    return found if chosen is None else found.on(chosen, call.heads)


def weighing_of(step: Step, job: AttentionCall, call: Call) -> Weighing:
    """What a step makes each weight of."""
    found = step.act(job.run_state.view(step, call))
    if not isinstance(found, Weighing):
        raise step.fault(call, f"must return a Weighing, got {type(found).__name__}")
    job.run_state.changed.add(step)  # no weighing is a softmax
    return found


def _bound(mask: Mask, heads: int) -> set[int]:
    """The heads that see no key after its query."""
    if mask.causal:
        return set(range(heads))
    return {head for rule in mask.rules if _parted(rule) for head in rule.heads}


def _parted(rule: Rule) -> TypeGuard[OnHeads]:
    """Causality that some heads were let out of."""
    return isinstance(rule, OnHeads) and isinstance(rule.rule, Causal)


def _given(step: Step, mask: Mask, chosen: list[int] | None, heads: int) -> Mask:
    """The mask that a step may open: causal where any of its heads still is."""
    mine = set(range(heads) if chosen is None else chosen)
    if step.method.causal or mask.causal or not mine & _bound(mask, heads):
        return mask
    return Mask((Causal(), *(rule for rule in mask.rules if not _parted(rule))))


def _redrawn(step: Step, old: Mask, given: Mask, new: object, chosen: list[int] | None, heads: int) -> Mask:
    held = given.rules
    opened = given.causal and not step.method.causal and isinstance(new, Mask) and not new.causal
    if opened:
        held = tuple(rule for rule in held if not isinstance(rule, Causal))
    if not isinstance(new, Mask) or new.rules[: len(held)] != held:
        raise SiteError(
            f"{step}: must return the mask it was given, narrowed, as in `return mask & Window(256)`; a method whose "
            "`causal` is False may leave causality out"
        )
    if chosen is None and given is old:
        return new
    own = new.rules[len(held) :]
    if chosen is not None:
        own = tuple(rule.on(tuple(chosen), heads) for rule in own)
    if not opened:
        return Mask(old.rules + own)
    rest = sorted(_bound(old, heads) - set(range(heads) if chosen is None else chosen))
    return Mask((*held, *own, *([Causal().on(tuple(rest), heads)] if rest else [])))


def redraws(call: Call, before: Mask) -> bool:
    """Whether the call's mask drops a pair that `before` kept, or keeps one that it dropped."""
    if call.mask is before:
        return False
    everything = torch.ones((), dtype=torch.bool, device=call.queries.index.device)
    for part in call.bands(128):
        new, old = (everything if x is None else x for x in (mask.keeps(part.pairs) for mask in (call.mask, before)))
        if bool((new != old).any()):
            return True
    return False


def keep_entries(job: AttentionCall, entries: CachedKV) -> list[Kept]:
    """What the CACHE steps leave of the entries, one after another."""
    if mixed(entries.key):
        with unmixed(entries.key):
            return keep_entries(job, entries)
    left: list[Kept] = []
    kept, padding = entries.is_filled, job.call.mask.padding
    is_text = None if padding is None else padding.at(entries.positions.index)
    for step in (steps := job.plan.at(Site.CACHE)):
        seen = job.run_state.view(step, job.call)
        mine = replace(entries, in_row=is_text)
        with Untouched(step, job, entries.key, entries.value):
            given = step.act(mine, seen)
        new = _left(step, given, entries, job.call)
        left.append(new)
        if new.keep is not None:
            narrowed = kept & new.keep if len(left) > 1 or entries.positions.is_filled is not None else new.keep
            job.run_state.watch(step, kept, narrowed)
            kept = narrowed
        if step is steps[-1] and step in job.run_state.changed:
            break  # nobody looks at what it wrote
        key, value = _written(entries.key, new.key), _written(entries.value, new.value)
        job.run_state.watch(step, entries.key, key)
        job.run_state.watch(step, entries.value, value)
        entries = replace(entries, key=key, value=value)
    return left


def _written(old: Tensor, new: Tensor | Packing | None) -> Tensor:
    """The keys or values that the next step sees."""
    return old if new is None else new.over(old) if isinstance(new, Packing) else new


def _left(step: Step, given: object, entries: CachedKV, call: Call) -> Kept:
    """What one step leaves, checked, and in the heads that it is for."""
    kept = given if isinstance(given, Kept) else Kept(given)  # type: ignore[arg-type]
    shape = entries.key.shape[:3]
    new = kept.keep
    all_stay = new is None and kept is given
    if not all_stay and (not isinstance(new, Tensor) or new.dtype != torch.bool or new.shape != shape):
        rule = f"must return which entries stay, bool of shape {tuple(shape)}"
        raise step.fault(call, f"{rule}, got {shape_of(new, typed=True)}")
    for name, old, written in (("key", entries.key, kept.key), ("value", entries.value, kept.value)):
        if isinstance(written, Packing):
            those, rows = written.those, tuple(written.rows.shape)
            if those.dtype != torch.bool or those.shape != shape or rows != (int(those.sum()), old.shape[3]):
                rule = f"a Packing of a {name} says which entries are packed, bool of shape {tuple(shape)}"
                raise step.fault(call, f"{rule}, and packs [{int(those.sum())}, {old.shape[3]}] rows, not {rows}")
        elif written is not None and written.shape != old.shape:
            rule = f"a Kept's {name} has the shape of what was handed over, {tuple(old.shape)}"
            raise step.fault(call, f"{rule}, not {tuple(written.shape)}")
    chosen = chosen_heads(step, call)
    if chosen is None:
        return kept

    def there(old: Tensor, new: Tensor | Packing | None) -> Tensor | Packing | None:
        if new is None:
            return None
        if isinstance(new, Packing):
            return new.among(chosen)
        return in_these(old, new, chosen)

    keep = None if new is None else in_these(torch.ones_like(new), new, chosen)
    return Kept(keep, there(entries.key, kept.key), there(entries.value, kept.value))
