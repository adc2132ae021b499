"""What every adapter does with an attention call once it is told in heedful's terms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from heedful.adapters.compiled import require_written_down
from heedful.adapters.kvcache import HeldLayer
from heedful.core.call import CachedKV, Call
from heedful.core.errors import SiteError, StatisticError
from heedful.core.mask import Padding
from heedful.core.sites import Site
from heedful.core.values import replace
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import Backend
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.plan import Plan
from heedful.engine.run import Run
from heedful.engine.select import select_once
from heedful.engine.stages import keep_entries


@dataclass(frozen=True, eq=False)
class Operands:
    """What a model asks of one attention call."""

    q: Tensor  # [b h q d]
    k: Tensor  # [b g k d]
    v: Tensor  # [b g k d]
    bias: Tensor | None = None  # added to scores
    sink: Tensor | None = None  # a logit without key or value
    dropout: float = 0.0
    pattern: bool = False  # the caller wants the pattern back
    unasked: bool = False  # the caller did not ask for it, and may hand it on all the same


def rows_of(hidden: Tensor | None, q: Tensor) -> Tensor | None:
    """The block's input as `[b n e]`, where it has one row for each query."""
    if hidden is not None and hidden.ndim == 2:
        hidden = hidden[None]
    fits = hidden is not None and hidden.ndim == 3 and hidden.shape[:2] == (q.shape[0], q.shape[2])
    return hidden if fits else None


def plan_of(run: Run, call: Call) -> Plan:
    """The steps that act in a call."""
    plan = run.state.plan(call)
    if (step := plan.one_text) is not None and call.queries.packed:
        kind, what = (StatisticError, "counts texts") if step.edit.reads else (SiteError, "takes a row for one text")
        raise kind(
            f"{step.part!r} {what}, and several are packed into one row (position_ids begin anew): give each a row of "
            "its own, padded"
        )
    return plan


def replaced_whole(run: Run, plan: Plan, call: Call, operands: Operands) -> Call | None:
    """The call as it is seen by the step that replaces the whole block; None where none does."""
    if not (steps := plan.at(Site.BLOCK)):
        return None
    if operands.pattern:
        raise SiteError(f"{steps[0]}: gives no weights; call {call.name} with need_weights=False")
    run.state.backends[call.layer] = repr(steps[0].part)
    if not steps[0].edit.before_rotary:
        return call
    return replace(call, query=operands.q, key=operands.k, value=operands.v)


def no_heads(q: Tensor, v: Tensor) -> Tensor:
    """`[b q h d]` of zeros, which stand for what nobody reads."""
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def left_alone(run: Run, plan: Plan) -> bool:
    """Whether the model's own attention gives what is asked for."""
    return not plan.inside and run.backend == "auto"


def computed(run: Run, plan: Plan, call: Call, operands: Operands) -> tuple[Tensor, Tensor | None, AttentionCall]:
    """Heads `[b h q d]`, the pattern where it was asked for, and the call as CACHE steps should see it."""
    mixes = plan.at(Site.MIX) if Site.MIX in plan.acts else ()
    if operands.pattern and mixes:
        raise SiteError(
            f"{mixes[0]}, layer {call.layer}: computes no pattern, so the weights that the caller wants "
            "(output_attentions, need_weights) cannot be given; leave that out"
        )
    pattern = operands.pattern or (operands.unasked and not mixes)
    job = AttentionCall(plan, run.state, call, operands.bias, operands.sink, operands.dropout, pattern)

    def choose(needs: Needs) -> Backend:
        backend = select_once(run.backend, needs, plan.backends)
        require_written_down(call.name, backend.name)
        run.state.backends[call.layer] = backend.name
        return Tiled(run.tile_rows) if run.tile_rows and backend.name == "tiled" else backend

    for step in mixes:
        run.state.backends[call.layer] = repr(step.part)
    heads, weights, call = attend(job, operands.q, operands.k, operands.v, choose)
    return heads, weights, replace(job, call=call)


def evict(job: AttentionCall, held: HeldLayer, k: Tensor, v: Tensor) -> None:
    """Leave of a layer of the cache what CACHE steps keep."""
    left = keep_entries(job, CachedKV(k, v, job.call.keys, held.fresh))
    if left:
        held.keep(*left)
        tokens, layer = held.seen * len(held.counts), job.call.layer
        job.run_state.kept[layer] = _kept(held, job.call.mask.padding)
        job.run_state.cache_bytes[layer] = (held.nbytes, tokens * (k.shape[3] * k.itemsize + v.shape[3] * v.itemsize))


def _kept(held: HeldLayer, padding: Padding | None) -> tuple[int, int]:
    """How many entries of texts a layer of the cache holds, and of how many; padding is nobody's."""
    if padding is None:
        return sum(held.counts), held.seen * len(held.counts)
    left = padding.at(held.index) & held.is_filled
    return int(left.sum()), int(padding.text[:, : held.seen].sum()) * held.heads[1]
