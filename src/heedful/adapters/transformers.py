"""Into any transformers model through its official attention and mask interfaces; no model class is known here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from heedful.adapters.arguments import understand
from heedful.adapters.bound import (
    ADDITIVE,
    LAZY,
    Bound,
    Outcome,
    Request,
    StandIn,
    bound_modules,
    bound_to,
    native,
    native_name,
)
from heedful.adapters.compiled import WrittenCalls
from heedful.adapters.hooks import Hooks
from heedful.adapters.kvcache import HeldLayer, held_layer
from heedful.adapters.layers import block_of, interface_layers, leftovers, size_of, within
from heedful.adapters.saving import adopted, takes_saving
from heedful.adapters.wrapped import unwrapped
from heedful.core.call import CachedKV, Call, Phase
from heedful.core.errors import FieldError, RefusedModel, SiteError, StatisticError
from heedful.core.method import Layer
from heedful.core.sites import Site
from heedful.core.stack import Stack
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends import Backend
from heedful.engine.backends.tiled import Tiled
from heedful.engine.learned import PREFIX
from heedful.engine.needs import Needs
from heedful.engine.run import Run
from heedful.engine.select import select
from heedful.engine.stages import keep_entries

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
    shared: bool = False  # its gradients are shared with other processes, as far as they were known at the start
    _names_put: list[tuple[PreTrainedConfig, StandIn]] = field(default_factory=list)
    _added: list[tuple[nn.Module, str]] = field(default_factory=list)
    _calls: WrittenCalls = field(default_factory=WrittenCalls)
    _hooks: Hooks = field(init=False)
    _saves: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._modules = interface_layers(self.model)
        names = [n for n in self._modules if within(n, self.only)]
        kind = type(self.model).__name__
        left = [n for n in leftovers(self.model) if within(n, self.only)]
        if self.only is not None:
            for prefix in self.only:
                if not any(within(n, (prefix,)) for n in self._modules):
                    roots = sorted({".".join(n.split(".")[:2]) for n in self._modules})
                    raise FieldError(
                        "attach()", "only", prefix, f"no served layer of {kind} lies there", roots[:1] or None
                    )
        if not names:
            raise RefusedModel(
                f"{kind} has no attention layer that goes through transformers' attention interface"
                + (f"; its own are {_some(left)}" if left else "")
            )
        if left:
            raise RefusedModel(
                f"{kind} computes some attention by itself, which heedful cannot reach: {_some(left)}. To work on the "
                f"rest and leave these alone, name it: attach(..., only={_roots(names, left)!r})"
            )
        self._names = tuple(names)

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self._names

    @property
    def installed(self) -> bool:
        return bool(self._names_put)

    def sizes(self) -> tuple[Layer, ...]:
        return tuple(size_of(self.model, name, i) for i, name in enumerate(self._names))

    def adopted(self, stack: Stack) -> int:
        return adopted(self.model, stack, self.only)

    def carried(self) -> set[tuple[int, str]]:
        """Parameters that an earlier run left in the served layers, as a copy of an attached model has them."""
        return {
            (i, key)
            for i, name in enumerate(self._names)
            for key, _ in self.model.get_submodule(name).named_parameters(recurse=False)
            if key.startswith(PREFIX)
        }

    def parameter(self, layer: int, name: str, start: Tensor) -> nn.Parameter:
        """A learned parameter in a layer's module: the one that it carries already, or a new one beside its weights."""
        path = self._names[layer]
        module = self.model.get_submodule(path)
        have = module._parameters.get(name)
        if have is not None:
            if have.shape != start.shape:
                rule = f"is what {path} carries of an earlier run, and must have the shape that the method asks for"
                raise FieldError("attach()", name, tuple(have.shape), rule, tuple(start.shape))
            if have.is_meta:
                raise RefusedModel(f"{name} is offloaded with {path}, and heedful reads it there; load without offload")
            return have
        if self.shared:
            raise RefusedModel(
                f"DistributedDataParallel shares the gradients of the parameters that it was made with, and {name} "
                "would not be among them; attach to the model in it first, then wrap that"
            )
        # offloaded weights are on 'meta' until they are used; those that are not are where the model computes
        beside = (p for p in chain(module.parameters(), self.model.parameters()) if not p.is_meta)
        if (reference := next(beside, None)) is None:
            raise RefusedModel(
                f"all weights of {type(self.model).__name__} are offloaded, so {name} has no device to learn on; load "
                "the model without offload"
            )
        parameter = nn.Parameter(start.to(reference.device, self.model.dtype))
        self._added.append((module, name))  # first, so that none is lost to an interrupt
        module.register_parameter(name, parameter)
        return parameter

    # into the model and out again

    def install(self, run: Run) -> None:
        self.run = run
        taken = [n for n, m in self._modules.items() if bound_to(m) is not None]
        if taken:
            raise FieldError(
                "attach()", "model", type(self.model).__name__,
                "a run is attached already; close it, or join the methods into one stack", "attach(model, a | b)",
            )  # fmt: skip
        hooks = self._hooks = Hooks(run, len(self._names))
        numbers = {name: i for i, name in enumerate(self._names)}
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
                bound = Bound(self, module, name, numbers.get(name), natives[name], alone)
                hooks.around(bound)
                bound_modules[module] = ref(bound)
                bounds.append(bound)
                if run.stack.touches(Site.BLOCK) and bound.number is not None:
                    hooks.spare(self.model, bound)
                if run.stack.touches(Site.BLOCK, Site.OUTPUT) and bound.number is not None:
                    hooks.after_projection(self.model, bound)
            served = [bound for bound in bounds if bound.number is not None]
            if run.stack.touches(Site.EMBEDDING):
                hooks.before_blocks(self.model, served)
            if run.stack.touches(Site.RESIDUAL):
                hooks.after_blocks(self.model, served)
            hooks.forwards(self.model)
            self._saves = takes_saving(run, self.model, self.only)
            for takes in self._saves:
                takes.begin()
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
        for takes in self._saves:
            takes.end()
        if hasattr(self, "_hooks"):  # an attach may end before it has any
            self._hooks.remove()
        for config, name in self._names_put:
            name.users.discard(self)
            if not name.users and config._attn_implementation_internal is name:  # else it was given another since
                config._attn_implementation_internal = name.native
        for module in self._modules.values():
            if (bound := bound_to(module)) is not None and bound.server is self:
                bound_modules.pop(module, None)
        self._names_put = []

    def drop_parameters(self) -> None:
        for module, name in self._added:
            module._parameters.pop(name, None)
        self._added = []

    # one attention call

    @property
    def under_way(self) -> bool:
        return self._hooks.under_way

    def attention(self, bound: Bound, request: Request) -> Outcome:
        bound.called = True
        if bound.number is None:
            return native(bound.module, bound.native, request)
        run, run_state = self.run, self.run.state
        q, k, v = request.q, request.k, request.v
        run_state.entered[bound.number] += 1
        held = None
        if bound.cache is not None and not bound.cross:
            held = held_layer(bound.cache, getattr(bound.module, "layer_idx", None), k, v, bound.name)
        given = understand(bound, request, held)
        past = (given.queries.first or 0) > 0 or (bound.cross and bound.cache is not None)
        phase = Phase.DECODE if q.shape[2] == 1 and past else Phase.PREFILL
        call = bound.call = Call(
            bound.number, len(self._names), bound.name, q.shape[1], k.shape[1], given.queries, given.keys, given.scale,
            given.softcap, phase, run_state.denoising, bound.cross, self._hooks.roles(bound, len(given.keys)),
            _rows(bound.hidden, q), bound.rotate, given.mask, max(0, run_state.now.number), batch=len(q),
        )  # fmt: skip
        plan = run_state.plan(call)
        if plan.summed and given.queries.packed:
            raise StatisticError(
                f"{plan.summed[0].part!r} counts texts, and several are packed into one row (position_ids begin anew): "
                "give each a row of its own, padded"
            )
        if plan.at(Site.BLOCK):
            run_state.backends[bound.number] = repr(plan.at(Site.BLOCK)[0].part)
            if plan.at(Site.BLOCK)[0].edit.before_rotary:
                bound.call = replace(call, query=q, key=k, value=v)
            return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]), None
        pattern = self._hooks.patterns or bool(request.more.get("output_attentions"))
        # a kernel of the model's own would leave the pattern out without a word
        own = (not pattern or bound.native == "eager") and (held is None or held.whole)
        if own and not plan.acts_inside() and run.backend == "auto":
            run_state.backends[bound.number] = f"the model's own ({bound.native})"
            return native(bound.module, bound.native, request)
        unasked = bound.alone and bound.native == "eager" and not plan.at(Site.MIX)
        if pattern and plan.at(Site.MIX):
            raise SiteError(
                f"{plan.at(Site.MIX)[0]}, layer {bound.number}: computes no pattern, so the model's output_attentions "
                "cannot be given; leave it out"
            )
        dropout = request.dropout if bound.module.training else 0.0
        job = AttentionCall(plan, run_state, call, given.bias, given.sink, dropout, pattern or unasked)
        number = bound.number

        def choose(needs: Needs) -> Backend:
            backend = select(run.backend, needs)
            run_state.backends[number] = backend.name
            return Tiled(run.tile_rows) if run.tile_rows and backend.name == "tiled" else backend

        for step in plan.at(Site.MIX):
            run_state.backends[number] = repr(step.part)
        heads, weights, call = attend(job, q, k, v, choose)
        if held is not None:
            _evict(replace(job, call=call), held, k, v)
        run_state.close_call(plan, call)
        return heads.transpose(1, 2).contiguous(), None if weights is None else weights.to(q.dtype)


def _rows(hidden: Tensor | None, q: Tensor) -> Tensor | None:
    """The block's input as `[b n e]`, where it has one row for each query."""
    if hidden is not None and hidden.ndim == 2:
        hidden = hidden[None]
    fits = hidden is not None and hidden.ndim == 3 and hidden.shape[:2] == (q.shape[0], q.shape[2])
    return hidden if fits else None


def _evict(job: AttentionCall, held: HeldLayer, k: Tensor, v: Tensor) -> None:
    left = keep_entries(job, CachedKV(k, v, job.call.keys, held.fresh))
    if left:
        held.keep(*left)
        tokens, layer = held.seen * len(held.counts), job.call.layer
        job.run_state.kept[layer] = (sum(held.counts), tokens)
        job.run_state.cache_bytes[layer] = (held.nbytes, tokens * (k.shape[3] * k.itemsize + v.shape[3] * v.itemsize))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _roots(served: Iterable[str], left: list[str]) -> list[str]:
    """The shortest prefixes that hold served layers and none of the others."""
    out: list[str] = []
    for name in served:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            prefix = ".".join(parts[:i])
            if not any(within(x, (prefix,)) for x in left):
                if prefix not in out:
                    out.append(prefix)
                break
    return out


def adapt(model: nn.Module, only: str | Iterable[str] | None) -> TransformersAdapter:
    """An adapter for the model, or the one in it, or the reason why there is none."""
    several = isinstance(only, Iterable) and not isinstance(only, str)
    chosen: Any = None if only is None else tuple(only) if several else (only,)
    for name in chosen or ():
        if not isinstance(name, str):
            raise FieldError("attach()", "only", only, "must be dotted names of parts of the model", "model.layers")
    return TransformersAdapter(unwrapped(model), chosen, shared=isinstance(model, DistributedDataParallel))
