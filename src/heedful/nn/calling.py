"""One call of an `Attention`: what a model's own module and an adapter do together, in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.cache_utils import Cache

from heedful.adapters.answering import Operands, computed, evict, plan_of, replaced_whole
from heedful.adapters.carried import shelf_of
from heedful.adapters.kvcache import HeldLayer, hold, own_cache, shrinking
from heedful.adapters.operations.torch_masks import placed
from heedful.adapters.replacing import ROTATED, UNROTATED
from heedful.core.call import Call, Phase
from heedful.core.errors import RefusedModel, SiteError
from heedful.core.mask import Dense
from heedful.core.positions import Positions
from heedful.core.sites import Site
from heedful.engine.attend import replaced
from heedful.engine.attention_call import AttentionCall
from heedful.engine.plan import Plan
from heedful.engine.stages import stage
from heedful.nn.masks import Sizes, Told
from heedful.nn.rotary import turned

if TYPE_CHECKING:
    from heedful.nn.attention import Attention


@dataclass(frozen=True, eq=False)
class Given:
    """What a module is called with, batch first."""

    query: Tensor  # [b n e]
    key: Tensor | None  # [b m .]; None: the query's own sequence, as HIDDEN leaves it
    value: Tensor | None  # the same
    told: Told
    sizes: Sizes
    cross: bool
    cache: Cache | None


def attended(module: Attention, given: Given, need_weights: bool | None) -> tuple[Tensor, Tensor | None]:
    """The output `[b n e]`, and the pattern `[b h n m]`: asked for, refused, or with None where there is one."""
    run, state, cache = module.run, module.run.state, given.cache
    call = _call(module, given)
    state.entered[module.layer] += 1
    state.begin(module.layer, shelf_of(cache), module)
    unturned = {s.edit.site for s in module.run.stack.steps(module.layer) if s.edit.before_rotary}
    early = _plan(module, call, Site.HIDDEN, Site.BLOCK, *unturned)
    hidden = stage(Site.HIDDEN, given.query, AttentionCall(early, state, call), call)
    q, k, v = _projected(module, given, hidden, early)
    if call.rotate is not None and not _unrotated(module, call, early, given):
        q, k = call.rotate(q), call.rotate(k)
    k, v, held = _cached(module, given, call, k, v)
    call = replace(call, hidden=hidden, keys=call.keys if held is None or held.whole else _left(held, given, call))
    plan = _plan(module, call)
    dropout = module.dropout if module.training else 0.0
    operands = Operands(q, k, v, given.told.bias, None, dropout, bool(need_weights), need_weights is None)
    if (seen := replaced_whole(run, plan, call, operands)) is not None:
        weights, job = None, AttentionCall(plan, state, seen)
        output = replaced(plan.at(Site.BLOCK)[0], job, seen, given.query)
    else:
        heads, weights, job = computed(run, plan, call, operands)
        if held is not None:
            evict(job, held, k, v)
        output = module.out_proj(heads.to(q.dtype).transpose(1, 2).flatten(2))
    output = stage(Site.OUTPUT, output, job, job.call)
    state.close_call(plan, job.call)
    return output, None if weights is None else weights.to(output.dtype)


def _call(module: Attention, given: Given) -> Call:
    """What is known before anything is projected; keys and values are those of a whole cache."""
    run, sizes = module.run, given.sizes
    text = None if given.cross else given.told.text
    queries, keys = placed(text, sizes.past, sizes.queries, sizes.keys, given.query.device)
    phase = Phase.of(queries, sizes.past > 0)
    rotate = None if module.rotary is None else partial(turned, places=queries.position, base=module.rotary)
    return Call(
        module.layer, module.depth, run.layer_names[module.layer], module.num_heads, module.kv_heads, queries, keys,
        module.head_dim**-0.5, phase=phase, denoising=run.state.denoising, cross=given.cross, training=module.training,
        roles=run.roles, hidden=given.query, rotate=rotate, mask=given.told.mask, forward=run.state.now.number,
        batch=sizes.rows,
    )  # fmt: skip


def _plan(module: Attention, call: Call, *sites: Site) -> Plan:
    """The steps that act in a call; none while the run is paused or closed."""
    if not module.run.installed():
        return Plan(())
    return module.run.state.plan(call, *sites) if sites else plan_of(module.run, call)


def _projected(module: Attention, given: Given, hidden: Tensor, early: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head; where the block is replaced, zeros for those that nobody reads."""
    blocks = early.at(Site.BLOCK)
    unread = bool(blocks) and not blocks[0].edit.before_rotary
    key, value = (hidden if x is None else x for x in (given.key, given.value))
    later = unread and given.cache is None  # else a call that is not replaced may read what the cache holds
    streams = ((module.q_proj, hidden, unread), (module.k_proj, key, later), (module.v_proj, value, later))
    made = (x.new_zeros(*x.shape[:2], p.out_features) if spared else p(x) for p, x, spared in streams)
    q, k, v = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in made)
    return q, k, v


def _unrotated(module: Attention, call: Call, early: Plan, given: Given) -> bool:
    """Whether queries and keys stay as they are, for a method that replaces the rotary embedding too."""
    asking = [step for step in (*early.at(Site.MIX), *early.at(Site.BLOCK)) if step.edit.before_rotary]
    if asking and not shelf_of(given.cache).takes(module.layer, UNROTATED, given.sizes.past):
        raise SiteError(f"{asking[0]}, {call.name}: {ROTATED}")
    return bool(asking)


def _cached(
    module: Attention, given: Given, call: Call, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, HeldLayer | None]:
    """All keys and values so far, and the layer of the cache if it is one that can shrink."""
    cache, number = given.cache, module.layer
    if cache is None:
        return k, v, None
    if module.run.installed() and module.run.stack.touches(Site.CACHE):
        hold(own_cache(cache), number, call.name)
    if (held := shrinking(own_cache(cache), number)) is not None:
        held.served = True
    k, v = cache.update(k, v, number)
    if held is not None:
        held.require(k, v, call.name)
    else:
        k, v = (x[:, :, : given.sizes.keys] for x in (k, v))  # a static cache has empty room behind them
        if k.shape[2] < given.sizes.keys:
            raise RefusedModel(
                f"{call.name}: its layer of {type(cache).__name__} forgets what slides out of a window; use a cache "
                "that keeps all, and a method such as SinkWindow for the window"
            )
    return k, v, held


def _left(held: HeldLayer, given: Given, call: Call) -> Positions:
    """Where the entries stand that the cache still holds."""
    if given.told.bias is not None or any(isinstance(rule, Dense) for rule in given.told.mask.rules):
        raise SiteError(f"{call.name}: attn_mask cannot be laid over a cache with dropped entries; leave it out")
    pad = call.keys.index - call.keys.position
    return held.positions(None if call.keys.pads == (0, 0) else pad[:, 0, 0])
