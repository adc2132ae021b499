"""The door of transformers: its official attention and mask interfaces; no model class is known here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.adapters.answering import Operands, computed, evict, left_alone, no_heads, plan_of, replaced_whole, rows_of
from heedful.adapters.arguments import understand
from heedful.adapters.bound import ADDITIVE, LAZY, Bound, Outcome, Request, StandIn, native, native_name
from heedful.adapters.hooks import Hooks
from heedful.adapters.layers import block_of, interface_layers, list_of
from heedful.adapters.lazymask import LazyMask
from heedful.adapters.rotation import rotation
from heedful.adapters.spread import spread_of
from heedful.core.call import Phase
from heedful.core.errors import RefusedModel
from heedful.core.sites import Site
from heedful.core.values import replace
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
class Interface:
    """The layers of a model that look their attention up by the name in its config, and answers for them."""

    model: Any
    _names_put: list[tuple[PreTrainedConfig, StandIn]] = field(default_factory=list, init=False)
    hooks: Hooks = field(init=False)  # of the run that is in the model, or was the last one there

    def __post_init__(self) -> None:
        self.layers = interface_layers(self.model)

    @property
    def run(self) -> Run:
        return self.hooks.run

    @property
    def under_way(self) -> bool:
        return self.hooks.forwards.under_way

    # into the model and out again

    def open(self, hooks: Hooks) -> None:
        """Put heedful's names into the configs; transformers' own setter would give all parts of a model one name."""
        self.hooks = hooks
        self._natives = {name: native_name(self._implementation(m)) for name, m in self.layers.items()}
        if not self.layers:
            return
        closed = {
            id(m.config)
            for m in self.model.modules()
            if isinstance(m, PreTrainedModel) and not m._can_set_attn_implementation()
        } - {id(getattr(m, "config", None)) for m in self.layers.values()}
        for config in _configs(self.model):
            if id(config) in closed:
                continue
            name = config._attn_implementation_internal  # transformers offers a setter and no getter
            if not isinstance(name, StandIn):
                name = StandIn(ADDITIVE if native_name(name) == "eager" else LAZY, name)
            self._names_put.append((config, name))  # first, so that none is lost to an interrupt
            name.users.add(self)
            config._attn_implementation_internal = name

    def bind(self, name: str) -> Bound:
        """What the run knows of a layer, which may run outside the part that is served."""
        module = self.layers[name]
        if self._implementation(module) not in HEEDFUL:
            raise RefusedModel(
                f"{name} ({type(module).__name__}) did not take heedful's attention; its class does not "
                "support setting the attention implementation"
            )
        bound = Bound(self, module, name, None, self._natives[name])
        bound.alone, bound.spread = block_of(self.model, name) is None, spread_of(self.model, name)
        return bound

    def stand(self, bound: Bound) -> None:
        """Spare the projections of a layer, where the stack replaces it."""
        if self.run.stack.touches(Site.BLOCK) and bound.number is not None:
            self.hooks.spare(self.model, bound)
        if self.run.stack.touches(Site.BLOCK, Site.OUTPUT) and bound.number is not None:
            self.hooks.after_projection(self.model, bound)

    def _implementation(self, module: nn.Module) -> str:
        config = getattr(module, "config", None) or self.model.config
        return config._attn_implementation or "eager"

    def close(self) -> None:
        for config, name in self._names_put:
            name.users.discard(self)
            if not name.users and config._attn_implementation_internal is name:  # else it was given another since
                config._attn_implementation_internal = name.native
        self._names_put = []

    # one attention call

    def is_layer(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return True

    def attention(self, bound: Bound, request: Request) -> Outcome:
        bound.called = True
        run, forwards, held = self.hooks.run, self.hooks.forwards, bound.held
        run_state = run.state
        if bound.number is None:
            return self._resting(bound, request)
        run_state.entered[bound.number] += 1
        if held is not None:
            held.require(request.k, request.v, bound.name)
        elif not bound.steps.steps and run.backend == "auto" and self._understood(bound, request):
            run_state.backends[bound.number] = f"the model's own ({bound.native})"
            return self._resting(bound, request)
        mine, spread = request, bound.spread
        if spread is not None and (spread := spread.serves(request, run)) is not None:
            request = spread.joined(request)
        q, k, v = request.q, request.k, request.v
        told = forwards.told(bound) if run_state.now.told else None
        given = understand(bound, request, held, run_state.now.queries, told)
        if not bound.cross and given.mask.causal:
            run_state.now.causal.add(list_of(bound.name))
        phase = Phase.of(given.queries, bound.cross and bound.cache is not None)
        call = bound.call = replace(
            bound.outline, heads=q.shape[1], kv_heads=k.shape[1], queries=given.queries, keys=given.keys,
            scale=given.scale, softcap=given.softcap, phase=phase, denoising=run_state.denoising, cross=bound.cross,
            training=bound.module.training, ids=forwards.ids(bound, q.shape[0], q.shape[2]),
            roles=forwards.roles(bound, k.shape[2]), hidden=rows_of(bound.hidden, q), rotate=rotation(bound),
            mask=given.mask, forward=max(0, run_state.now.number), batch=q.shape[0], sizes=bound.sizes,
            in_order=bound.cross and list_of(bound.name) in run_state.now.causal,
        )  # fmt: skip
        plan = plan_of(run, call)
        if Site.BLOCK in plan.acts and (seen := replaced_whole(run, plan, call, Operands(q, k, v))) is not None:
            bound.call = seen
            return no_heads(mine.q, v), None
        pattern = self._wants_pattern(request)
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

    def _wants_pattern(self, request: Request) -> bool:
        return self.hooks.forwards.patterns or bool(request.more.get("output_attentions"))

    def _understood(self, bound: Bound, request: Request) -> bool:
        """Whether nothing of a call has to be looked at where the run leaves the layer to the model.

        Packed texts, and masks that a model makes itself, have to be understood first, for layers that come after; so
        have masks of other keys than came, as those of another layer, whose cache may have dropped some.
        """
        mask, n = request.mask, request.q.shape[2]
        packed = n > 1 and request.more.get("position_ids") is not None
        plain = isinstance(mask, LazyMask) and mask.shape[2:] == (n, request.k.shape[2]) and not packed
        wanted = bound.native != "eager" and self._wants_pattern(request)
        return (bound.cross or plain) and bound.merges is None and not wanted

    def _resting(self, bound: Bound, request: Request) -> Outcome:
        """What a layer gives where the run does nothing; those behind it are told where its tokens stand."""
        if not bound.cross and isinstance(request.mask, LazyMask):
            now, spec, home = self.hooks.run.state.now, request.mask.spec, list_of(bound.name)
            now.queries[home] = spec.queries
            if spec.mask.causal:
                now.causal.add(home)
        return native(bound.module, bound.native, request)
