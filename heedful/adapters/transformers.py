"""Into any transformers model through its official attention and mask interfaces; no model class is known here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from heedful.adapters.arguments import Asked, understand
from heedful.adapters.kvcache import HeldLayer, hold
from heedful.adapters.layers import interface_layers, leftovers, output_projection, projections, within
from heedful.adapters.lazymask import LazyMask, lazy_mask
from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError, NotEntered, RefusedModel
from heedful.core.mask import Places
from heedful.core.method import Layer
from heedful.core.sites import Site
from heedful.engine.attend import Job, attend, keep_entries, stage
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import Needs
from heedful.engine.run import Run
from heedful.engine.select import select

LAZY, ADDITIVE = "heedful", "heedful_additive"  # the second for models that compute with their mask


@dataclass(eq=False)
class Bound:
    """One attention module of an attached model."""

    adapter: TransformersAdapter
    module: nn.Module
    name: str
    number: int | None  # None: it runs through the interface, but outside the part that is served
    native: str
    hidden: Tensor | None = None
    cache: Cache | None = None
    cross: bool = False
    called: bool = False
    call: Call | None = None


_bound: WeakKeyDictionary[nn.Module, Bound] = WeakKeyDictionary()


def _function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function under heedful's name: hands the call to whichever run is attached to the module."""
    bound = _bound.get(module)
    if bound is None:
        raise NotEntered(
            f"{type(module).__name__} asks for heedful's attention, but no run is attached to it; was the model copied "
            "while a run was attached? Attach to the copy, or copy before attaching"
        )
    return bound.adapter.attention(bound, query, key, value, attention_mask, scaling, dropout, more)


AttentionInterface.register(LAZY, _function)
AttentionInterface.register(ADDITIVE, _function)
AttentionMaskInterface.register(LAZY, lazy_mask)
AttentionMaskInterface.register(ADDITIVE, eager_mask)


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
    _handles: list[Any] = field(default_factory=list)
    _restore: list[tuple[PreTrainedConfig, str]] = field(default_factory=list)
    _added: list[tuple[nn.Module, str]] = field(default_factory=list)
    _depth: int = 0

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

    def sizes(self) -> tuple[Layer, ...]:
        return tuple(projections(self.model, name, i).size for i, name in enumerate(self._names))

    def add_parameters(self, layer: int, name: str, parameter: nn.Parameter) -> None:
        module = self.model.get_submodule(self._names[layer])
        module.register_parameter(name, parameter)
        self._added.append((module, name))

    # into the model and out again

    def install(self, run: Run) -> None:
        self.run = run
        taken = [n for n, m in self._modules.items() if m in _bound]
        if taken:
            raise FieldError(
                "attach()", "model", type(self.model).__name__,
                "a run is attached already; close it, or join the methods into one stack", "attach(model, a | b)",
            )  # fmt: skip
        configs = _configs(self.model)
        # transformers offers a setter and no getter
        self._restore = [(c, c._attn_implementation_internal) for c in configs]
        numbers = {name: i for i, name in enumerate(self._names)}
        natives = {name: self._implementation(m) for name, m in self._modules.items()}
        try:
            self._switch()
            for name, module in self._modules.items():
                if self._implementation(module) not in (LAZY, ADDITIVE):
                    raise RefusedModel(
                        f"{name} ({type(module).__name__}) did not take heedful's attention; its class does not "
                        "support setting the attention implementation"
                    )
                bound = Bound(self, module, name, numbers.get(name), natives[name])
                _bound[module] = bound
                self._hook(module, bound)
            self._handles.append(self.model.register_forward_pre_hook(self._forward_begins))
            self._handles.append(self.model.register_forward_hook(self._forward_ends, always_call=True))
            if run.stack.touches(Site.OUTPUT):
                for name in self._names:
                    self._hook_output(name)
        except BaseException:
            self.remove()
            raise

    def _implementation(self, module: nn.Module) -> str:
        config = getattr(module, "config", None) or self.model.config
        return config._attn_implementation or "eager"

    def _switch(self) -> None:
        import logging

        log = logging.getLogger("transformers.modeling_utils")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of submodels that cannot be set; we look at the outcome instead
        try:
            for sub in [m for m in self.model.modules() if isinstance(m, PreTrainedModel)]:
                if sub._can_set_attn_implementation() and sub.config._attn_implementation not in (LAZY, ADDITIVE):
                    sub.set_attn_implementation(LAZY if getattr(sub, "_supports_sdpa", True) else ADDITIVE)
            for module in self._modules.values():
                config = getattr(module, "config", None)
                if isinstance(config, PreTrainedConfig) and config._attn_implementation not in (LAZY, ADDITIVE):
                    config._attn_implementation_internal = LAZY
        finally:
            log.setLevel(level)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for config, name in self._restore:
            config._attn_implementation_internal = name
        self._restore = []
        for module in self._modules.values():
            if (bound := _bound.get(module)) is not None and bound.adapter is self:
                del _bound[module]
        if self.run.closed:
            for module, name in self._added:
                delattr(module, name)
            self._added = []
        self._depth = 0

    # hooks

    def _hook(self, module: nn.Module, bound: Bound) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bound.called = False
            return self._enter(bound, args, kwargs)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            bound.hidden = None
            if not bound.called:
                raise NotEntered(
                    f"{bound.name} ({type(bound.module).__name__}) ran, but its attention did not pass through "
                    "heedful; the answer would silently be the unedited model's. Was it compiled or replaced since?"
                )

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after))

    def _enter(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_name = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if by_name else args[0] if args else None
        bound.hidden = hidden if isinstance(hidden, Tensor) else None
        bound.cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
        bound.cross = any(isinstance(kwargs.get(n), Tensor) for n in ("key_value_states", "encoder_hidden_states"))
        if bound.number is None:
            return None
        steps = self.run.stack.steps(bound.number)
        if any(s.edit.site is Site.CACHE for s in steps) and bound.cache is not None and not bound.cross:
            number = getattr(bound.module, "layer_idx", None)
            if number is None:
                raise RefusedModel(f"a CACHE edit cannot act in {bound.name}: the module does not tell its cache layer")
            hold(bound.cache, number, bound.name)
        if not any(s.edit.site is Site.HIDDEN for s in steps) or bound.hidden is None:
            return None
        call = self._outline(bound, bound.hidden, kwargs.get("attention_mask"))
        job = Job(self.run.book.plan(bound.number, call.phase), self.run.book, call)
        bound.hidden = stage(Site.HIDDEN, bound.hidden, job, call)
        self.run.book.close_call(job.plan, call)
        if by_name:
            return args, {**kwargs, "hidden_states": bound.hidden}
        return (bound.hidden, *args[1:]), kwargs

    def _outline(self, bound: Bound, hidden: Tensor, mask: Any) -> Call:
        """What can be known of a call before its queries are."""
        n = hidden.shape[1]
        if isinstance(mask, LazyMask):
            queries, keys = mask.spec.queries, mask.spec.keys
        else:
            queries = keys = Places.row(0, n, hidden.device)
        phase = Phase.DECODE if n == 1 and (queries.first or 0) > 0 else Phase.PREFILL
        return Call(
            bound.number or 0, len(self._names), bound.name, 0, 0, queries, keys, 1.0, phase=phase,
            roles=self.run.roles, hidden=hidden, forward=self.run.book.forward,
        )  # fmt: skip

    def _hook_output(self, name: str) -> None:
        found = output_projection(self.model, name)
        if found is None:
            raise RefusedModel(f"an OUTPUT edit cannot act in {name}: heedful finds no output projection there")
        bound = _bound[self.model.get_submodule(name)]

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            if bound.call is None or not isinstance(output, Tensor):
                return None
            call, bound.call = bound.call, None
            job = Job(self.run.book.plan(call.layer, call.phase), self.run.book, call)
            new = stage(Site.OUTPUT, output.view(len(output), -1, output.shape[-1]), job, call)
            self.run.book.close_call(job.plan, call)
            return new.view_as(output)

        self._handles.append(getattr(*found).register_forward_hook(after))

    def _forward_begins(self, model: nn.Module, args: Any) -> None:
        if self._depth == 0:
            self.run.book.new_forward()
        self._depth += 1

    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)

    # one attention call

    def attention(
        self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
        more: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        bound.called = True
        book = self.run.book
        if bound.number is None:
            return self._native(bound, q, k, v, mask, scaling, dropout, more)
        book.entered[bound.number] += 1
        held = self._held(bound, k)
        asked = Asked(bound.module, bound.name, bound.native, bound.cross, held, scaling, more)
        given = understand(asked, q, k, mask)
        start = given.queries.first or 0
        past = start > 0 or (bound.cross and bound.cache is not None)
        phase = Phase.DECODE if q.shape[2] == 1 and past else Phase.PREFILL
        plan = book.plan(bound.number, phase)
        call = Call(
            bound.number, len(self._names), bound.name, q.shape[1], k.shape[1], given.queries, given.keys, given.scale,
            given.softcap, phase, bound.cross, self.run.roles, bound.hidden, given.mask, max(0, book.forward),
        )  # fmt: skip
        bound.call = call
        pattern = bool(more.get("output_attentions"))
        if not plan.acts_inside() and held is None and self.run.backend == "auto":
            book.backends[bound.number] = f"the model's own ({bound.native})"
            return self._native(bound, q, k, v, mask, scaling, dropout, more)
        sink = given.sink
        job = Job(plan, book, call, given.bias, sink, dropout if bound.module.training else 0.0, pattern)
        needs = Needs.of(plan.steps, given.softcap is not None, sink is not None, pattern)
        backend = select(self.run.backend, needs)
        book.backends[bound.number] = backend.name
        if self.run.tile_rows and backend.name == "tiled":
            backend = Tiled(self.run.tile_rows)
        heads, weights = attend(job, q, k, v, backend)
        if held is not None and not bound.cross:
            self._evict(job, held, bound)
        book.close_call(plan, call)
        return heads.transpose(1, 2).contiguous(), weights

    def _held(self, bound: Bound, k: Tensor) -> HeldLayer | None:
        if bound.cache is None or bound.cross:
            return None
        cache = getattr(bound.cache, "self_attention_cache", bound.cache)
        number = getattr(bound.module, "layer_idx", None)
        layer = cache.layers[number] if number is not None and number < len(cache.layers) else None
        return layer if isinstance(layer, HeldLayer) and layer.keys.shape[-2] == k.shape[-2] else None

    def _evict(self, job: Job, held: HeldLayer, bound: Bound) -> None:
        kept = keep_entries(job, held.entries(job.call.keys))
        if kept is not None:
            job.book.kept[job.call.layer] = (int(kept.sum()), held.seen * kept.shape[0] * kept.shape[1])
            held.keep(kept)

    def _native(
        self, bound: Bound, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, dropout: float,
        more: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """What the model would have done, bit for bit."""
        if isinstance(mask, LazyMask):
            mask = mask.spec.native(bound.native)
        function = _native_function(bound)
        return function(bound.module, q, k, v, mask, scaling=scaling, dropout=dropout, **more)


def _native_function(bound: Bound) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if bound.native != "eager":
        return AttentionInterface()[bound.native]
    for base in type(bound.module).__mro__:
        home = sys.modules.get(base.__module__)
        with suppress(AttributeError):
            return home.eager_attention_forward  # type: ignore[union-attr]
    raise RefusedModel(f"{bound.name}: heedful finds no eager attention function beside {type(bound.module).__name__}")


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
    """An adapter for the model, or the reason why there is none."""
    if not isinstance(model, PreTrainedModel):
        raise RefusedModel(
            f"{type(model).__name__} is not a transformers model (a PreTrainedModel), the only kind served so far"
        )
    return TransformersAdapter(model, (only,) if isinstance(only, str) else tuple(only) if only is not None else None)
