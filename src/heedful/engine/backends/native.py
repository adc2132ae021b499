"""heedful's own kernel for the CPU: attention and the pattern's summary in one pass; masks are ranges of keys."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import BackendError
from heedful.core.mask import Dense, Mask
from heedful.core.paper import Paper
from heedful.core.positions import taken
from heedful.core.rules import Arranged, Ranged
from heedful.core.sites import Site
from heedful.core.values import replace
from heedful.engine.attend import gained, gained_by_distance
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.mapless import STRETCHES, kept_back, through
from heedful.engine.backends.merged import merged
from heedful.engine.backends.native_call import alone, computed
from heedful.engine.backends.parted import parts_of
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.plan import Plan
from heedful.native import Library, library

PAPER = Paper(
    "P139",
    "Flash Window Attention: speedup the attention computation for Swin Transformer",
    "Zhendong Zhang",
    2025,
    "2501.06480",
    differs=(
        "For a CPU: a window's map stays in the cache of the core that makes it, where the paper's stays in a GPU's "
        "shared memory, and is made again on the way back from what each row had for a maximum and a sum.",
        "Features are not divided: a core's cache holds all of a window's queries, keys and values.",
        "A bias that learns is cut into blocks of rows, which have their gradients one after another.",
    ),
)

GRAIN = 32  # what a block of a block table must be a multiple of: the widest panel of the kernel


class Native:
    name = "native"

    def refuses(self, needs: Needs) -> list[str]:
        kernel = library()
        reasons = [kernel] if isinstance(kernel, str) else []
        reasons += kept_back(needs)
        if needs.gradients and (needs.reweights or needs.sink_learns):
            what = "sink logits" if needs.sink_learns else f"what {needs.reweights[0]} moves"
            reasons.append(f"gradients are wanted of {what}, which this kernel has not")
        for x in needs.tensors:
            if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16):
                reasons.append(f"it runs on the CPU in float32 and bfloat16, and this call is {x.dtype} on {x.device}")
                break
        if len({x.dtype for x in needs.tensors}) > 1:
            reasons.append("queries, keys and values are of unlike types")
        if not reasons and (needs.sums or needs.reweights) and (why := _why_tiles(needs)):
            reasons.append(f"{why}, and tile by tile it sums nothing up")
        return reasons

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        kernel = library()
        if isinstance(kernel, str):
            raise BackendError(kernel)
        needs = job.needs or Needs(call=job.call)
        if (rule := _arranged(needs)) is not None:
            return _in_order(kernel, job, rule, q, k, v), None
        if not (needs.weighed or needs.adds) and (parts := parts_of(job, shared=True)):
            return merged(kernel, job, parts, q, k, v), None
        if (apart := _by_distance(job, needs)) is not None:
            return computed(kernel, apart, q, k, v), None
        if _why_tiles(needs):
            return Tiled(compute=partial(_tile, kernel))(job, q, k, v)
        if not job.plan.reweights:
            return computed(kernel, job, q, k, v), None
        return through(lambda plain: computed(kernel, plain, q, k, v), job, q, k, v), None


def _why_tiles(needs: Needs) -> str:
    """Why a call is not computed as a whole, if so: a tile of it can have a table of pairs, and a bias for each."""
    if needs.adds:
        return f"{needs.adds[0]} says tile by tile what scores gain"
    if needs.call is None:
        return ""
    if needs.gradients and needs.bias_learns:
        return "gradients are wanted of the bias"
    blocks = needs.call.mask.blocks
    if blocks and (len(blocks) > 1 or any(b.size % GRAIN for b in blocks)):
        return f"there is more than one block table of blocks that are a multiple of {GRAIN} wide"
    if blocks and any(b.first is not None for b in blocks):
        return "blocks begin with the text, and padding on the left moves them off the kernel's panels"
    passes = needs.gradients or not alone(needs.call)
    return STRETCHES if passes and needs.key_ranges is None else ""


def _by_distance(job: AttentionCall, needs: Needs) -> AttentionCall | None:
    """A call whose scores gain what goes by distance alone, as one of the whole."""
    if needs.bias or (gains := gained_by_distance(job)) is None:
        return None
    needs = replace(needs, adds=(), learned=(gains,))
    if _why_tiles(needs):
        return None
    plan = Plan(job.plan.at(Site.NORMALISE))
    return replace(job, plan=plan, bias=gains, diagonal=True, needs=needs, spare=None)


def _arranged(needs: Needs) -> Arranged | None:
    """The rule of a call that leaves out no pair but by an order of its tokens."""
    call = needs.call
    if call is None or needs.adds or needs.bias or call.keys.is_filled is not None:
        return None
    rules = call.mask.acting(call.queries, call.keys)
    return rules[0] if len(rules) == 1 and isinstance(rules[0], Arranged) else None


def _in_order(kernel: Library, job: AttentionCall, rule: Arranged, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A call whose tokens stand in the order of a rule, where each query's keys are ranges."""
    place = rule.place.long()
    order = place.argsort(-1)
    each = torch.broadcast_shapes(place.shape[:2], rule.ranges.shape[:2])
    ranges = taken(rule.ranges.long().expand(*each, -1, -1, -1).flatten(3), order).unflatten(3, (-1, 2))
    q, k, v = (taken(x, order) for x in (q, job.call.spread(k), job.call.spread(v)))
    call = replace(job.call, mask=Mask((Ranged(ranges),)), kv_heads=job.call.heads)
    needs = replace(job.needs or Needs(), call=call, tensors=(q, k, v))
    heads = computed(kernel, replace(job, call=call, needs=needs), q, k, v)
    return taken(heads, place)


def _tile(kernel: Library, job: AttentionCall, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A tile, as a call of its own: its mask is a table, and what its scores gain is a bias.

    A gain of minus infinity leaves no weight, so the kernel need not be told that the pair is not to be seen, but
    where it leaves nothing of a row, which shows in the heads, and where a weight may be a share of what a query sees.
    """
    gains = gained(job, call, q)
    heads = _gaining(kernel, job, call, gains, q, k, v)
    told = job.plan.at(Site.NORMALISE) or bool(heads.detach().isnan().any())
    if gains is None or not told or not bool((hidden := gains == -torch.inf).any()):
        return heads
    hidden = hidden.expand(-1, -1, len(call.queries), -1)
    seen = replace(call, keep=~hidden if call.keep is None else call.keep & ~hidden)
    return _gaining(kernel, job, seen, gains.masked_fill(hidden, 0.0), q, k, v)


def _gaining(
    kernel: Library, job: AttentionCall, call: Call, gains: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    mask = Mask() if call.keep is None else Mask((Dense(call.keep, apart=True),))
    own = replace(call, mask=mask, rows=slice(None), cols=slice(None), keep=None)
    learned = () if gains is None else (gains,)
    needs = replace(job.needs or Needs(), call=own, tensors=(q, k, v), learned=learned, adds=())
    plan = Plan(job.plan.at(Site.NORMALISE))
    return computed(kernel, replace(job, plan=plan, call=own, bias=gains, needs=needs, spare=None), q, k, v)
