"""Into any transformers model through its official attention and mask interfaces; no model class is known here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.adapters.answering import Operands, computed, evict, left_alone, no_heads, plan_of, replaced_whole, rows_of
from heedful.adapters.arguments import understand
from heedful.adapters.bound import (
    ADDITIVE,
    LAZY,
    Bound,
    Outcome,
    Request,
    StandIn,
    let_go,
    native,
    native_name,
    require_free,
    take,
)
from heedful.adapters.compiled import WrittenCalls
from heedful.adapters.hooks import Hooks
from heedful.adapters.kvcache import held_layer
from heedful.adapters.layers import (
    block_of,
    highest,
    interface_layers,
    leftovers,
    list_of,
    lowest,
    parts_of,
    served,
    size_of,
)
from heedful.adapters.lazymask import LazyMask
from heedful.adapters.planted import Planted
from heedful.adapters.rotation import rotation
from heedful.adapters.saving import Saving, adopted
from heedful.adapters.spread import spread_of
from heedful.adapters.wrapped import shared_by, unwrapped
from heedful.core.call import Call, Phase
from heedful.core.errors import RefusedModel
from heedful.core.method import Layer, Stack
from heedful.core.sites import Site
from heedful.engine.run import Run

HEEDFUL = (LAZY, ADDITIVE)


def _configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Every config in the model, each once."""
    found: dict[int, PreTrainedConfig] = {}
    queue: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    while queue:
        config = queue.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            queue += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


@dataclass(eq=False)
class TransformersAdapter:
    """Gets a run into one model."""

    model: PreTrainedModel
    only: tuple[str, ...] | None = None
    shared_by: str = ""  # what shares its gradients with other processes, as far as they were known at the start
    _names_put: list[tuple[PreTrainedConfig, StandIn]] = field(default_factory=list)
    planted: Planted = field(init=False)
    _calls: WrittenCalls = field(default_factory=WrittenCalls)
    _hooks: Hooks = field(init=False)

    def __post_init__(self) -> None:
        self._modules = interface_layers(self.model)
        left = {name: name for name in leftovers(self.model)}
        none = "has no attention layer that goes through transformers' attention interface"
        self._names = served(type(self.model).__name__, self._modules, left, self.only, none)
        self.planted = Planted(self.model, dict(enumerate(self._names)), self.shared_by)
        self._saving = Saving(self.model, self.only)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def ready(self) -> bool:
        return True

    @property
    def installed(self) -> bool:
        return bool(self._names_put)

    def sizes(self) -> tuple[Layer, ...]:
        last = highest(self._names)
        return tuple(replace(size_of(self.model, name, i), highest=last[i]) for i, name in enumerate(self._names))

    def adopted(self, stack: Stack) -> int:
        return adopted(self.model, stack, self.only)

    # into the model and out again

    def install(self, run: Run) -> None:
        self.run = run
        require_free(self.model, self._modules.values())
        hooks = self._hooks = Hooks(run, len(self._names), crosses=True)
        numbers = {name: i for i, name in enumerate(self._names)}
        first, last = (dict(zip(self._names, find(self._names), strict=True)) for find in (lowest, highest))
        natives = {name: native_name(self._implementation(m)) for name, m in self._modules.items()}
        bounds: list[Bound] = []
        try:
            self._switch()
            for name, module in self._modules.items():
                if self._implementation(module) not in HEEDFUL:
                    raise RefusedModel(
                        f"{name} ({type(module).__name__}) did not take heedful's attention; its class does not "
                        "support setting the attention implementation"
                    )
                alone = block_of(self.model, name) is None
                bound = Bound(self, module, name, numbers.get(name), natives[name], first.get(name, 0))
                bound.highest, bound.alone = last.get(name, 0), alone
                bound.spread = spread_of(self.model, name)
                hooks.around(bound)
                take([module], bound)
                bounds.append(bound)
                if run.stack.touches(Site.BLOCK) and bound.number is not None:
                    hooks.spare(self.model, bound)
                if run.stack.touches(Site.BLOCK, Site.OUTPUT) and bound.number is not None:
                    hooks.after_projection(self.model, bound)
            hooks.stream(self.model, [bound for bound in bounds if bound.number is not None])
            whole = {n: m for n, m in self.model.named_modules() if m is self.model or isinstance(m, PreTrainedModel)}
            hooks.forwards(whole)
            self._saving.begin(run)
            self._calls.lead_past(self.model)
        except BaseException:
            self.remove()
            raise

    def _implementation(self, module: nn.Module) -> str:
        config = getattr(module, "config", None) or self.model.config
        return config._attn_implementation or "eager"

    def _switch(self) -> None:
        """Put heedful's names into the configs; transformers' own setter would give all parts of a model one name."""
        closed = {
            id(m.config)
            for m in self.model.modules()
            if isinstance(m, PreTrainedModel) and not m._can_set_attn_implementation()
        } - {id(getattr(m, "config", None)) for m in self._modules.values()}
        for config in _configs(self.model):
            if id(config) in closed:
                continue
            name = config._attn_implementation_internal  # transformers offers a setter and no getter
            if not isinstance(name, StandIn):
                name = StandIn(ADDITIVE if native_name(name) == "eager" else LAZY, name)
            self._names_put.append((config, name))  # first, so that none is lost to an interrupt
            name.users.add(self)
            config._attn_implementation_internal = name

    def remove(self) -> None:
        self._calls.undo()
        self._saving.pause()
        if hasattr(self, "_hooks"):  # an attach may end before it has any
            self._hooks.remove()
        for config, name in self._names_put:
            name.users.discard(self)
            if not name.users and config._attn_implementation_internal is name:  # else it was given another since
                config._attn_implementation_internal = name.native
        let_go(self._modules.values(), self)
        self._names_put = []

    def leave(self) -> None:
        self.remove()
        self._saving.end()
        self.planted.drop()

    # one attention call

    @property
    def under_way(self) -> bool:
        return self._hooks.under_way

    def attention(self, bound: Bound, request: Request) -> Outcome:
        bound.called = True
        run, run_state = self.run, self.run.state
        if bound.number is None:
            if not bound.cross and isinstance(request.mask, LazyMask):
                run_state.now.queries[list_of(bound.name)] = request.mask.spec.queries
                if request.mask.spec.mask.causal:
                    run_state.now.causal.add(list_of(bound.name))
            return native(bound.module, bound.native, request)
        run_state.entered[bound.number] += 1
        held = None
        if bound.cache is not None and not bound.cross:
            held = held_layer(bound.cache, getattr(bound.module, "layer_idx", None), request.k, request.v, bound.name)
        mine, spread = request, bound.spread
        if spread is not None and (spread := spread.serves(request, run)) is not None:
            request = spread.joined(request)
        q, k, v = request.q, request.k, request.v
        given = understand(bound, request, held, run_state.now.queries)
        if not bound.cross and given.mask.causal:
            run_state.now.causal.add(list_of(bound.name))
        phase = Phase.of(given.queries, bound.cross and bound.cache is not None)
        call = bound.call = Call(
            bound.number, len(self._names), bound.name, q.shape[1], k.shape[1], given.queries, given.keys, given.scale,
            given.softcap, phase, run_state.denoising, bound.cross, bound.module.training,
            self._hooks.ids(bound, len(q), q.shape[2]), self._hooks.roles(bound, len(given.keys)),
            rows_of(bound.hidden, q), rotation(bound), given.mask, max(0, run_state.now.number),
            lowest=bound.lowest, highest=bound.highest, batch=len(q), sizes=bound.sizes,
            in_order=bound.cross and list_of(bound.name) in run_state.now.causal,
        )  # fmt: skip
        plan = plan_of(run, call)
        if (seen := replaced_whole(run, plan, call, Operands(q, k, v))) is not None:
            bound.call = seen
            return no_heads(mine.q, v), None
        pattern = self._hooks.patterns or bool(request.more.get("output_attentions"))
        # a kernel of the model's own would leave the pattern out without a word
        own = (not pattern or bound.native == "eager") and (held is None or held.whole)
        if bound.merges is not None:  # the mask that the model has is of all tokens
            own = own and request.mask is None and bound.merges.even
        if own and left_alone(run, plan):
            run_state.backends[bound.number] = f"the model's own ({bound.native})"
            return native(bound.module, bound.native, mine)
        unasked = bound.alone and bound.native == "eager"
        dropout = request.dropout if bound.module.training else 0.0
        operands = Operands(q, k, v, given.bias, given.sink, dropout, pattern, unasked)
        heads, weights, job = computed(run, plan, call, operands)
        if held is not None:
            evict(job, held, k, v)
        run_state.close_call(plan, job.call)
        if spread is not None:
            heads, weights = spread.own(heads), None if weights is None else spread.own(weights)
        return heads.transpose(1, 2).contiguous(), None if weights is None else weights.to(q.dtype)


def adapt(model: nn.Module, only: str | Iterable[str] | None) -> TransformersAdapter:
    """An adapter for the model, or the one in it, or the reason why there is none."""
    return TransformersAdapter(unwrapped(model), parts_of(only), shared_by(model))
