"""The door of torch's operations: modules that call torch's own attention, or write it out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from heedful.adapters.answering import Operands, computed, left_alone, no_heads, plan_of, replaced_whole, rows_of
from heedful.adapters.bound import Bound
from heedful.adapters.hooked import Hooked
from heedful.adapters.hooks import Hooks
from heedful.adapters.layers import apart, leftovers, list_of, unreached, within
from heedful.adapters.merging import require_no_table
from heedful.adapters.operations.entering import Entrance, Watched, otherwise
from heedful.adapters.operations.finding import MULTI_HEAD, SDPA, SHARED, Found, by_name, find, taking_of
from heedful.adapters.operations.layout import Layout, rows_in, same_rows
from heedful.adapters.operations.multi_head import Untouched, through_kernel
from heedful.adapters.operations.scores import Asked
from heedful.adapters.operations.torch_masks import halves, hides_later, places, rules_of
from heedful.adapters.projections import heads_told, output_module
from heedful.adapters.spread import spread_of
from heedful.adapters.wrapped import outside
from heedful.core.call import Call, Phase
from heedful.core.errors import NotEntered, RefusedModel
from heedful.core.sites import Site
from heedful.core.values import replace
from heedful.engine.run import Run

NATIVE = "torch's own"


@dataclass(eq=False)
class Operations:
    """The layers of a model that compute attention by torch's operations, and answers for them.

    They are found by running the whole model once, or are known by their classes, and are looked at one by one when
    they are first reached.
    """

    model: nn.Module
    candidates: Collection[str] = ()  # those that are known by their classes
    others: Collection[str] = ()  # layers that another door has
    found: Found = field(default_factory=Found, init=False)
    installed: bool = field(default=False, init=False)
    _around: set[str] = field(default_factory=set, init=False)  # candidates whose attention is all in others inside
    _stood: dict[str, Entrance] = field(default_factory=dict, init=False)
    _entrances: Hooked = field(default_factory=Hooked, init=False)
    _nested: list[nn.TransformerEncoder] = field(default_factory=list, init=False)
    hooks: Hooks = field(init=False)  # of the run that is in the model, or was the last one there

    @property
    def run(self) -> Run:
        return self.hooks.run

    # which modules are layers

    def look(self, run: Callable[[], Any], given: Any) -> dict[str, str]:
        """Learn from a forward which modules are attention layers; those out of reach, with what to say of them."""
        found = self.found = find(self.model, run, given)
        left = {name: self._said(name, why) for name, why in found.own.items()}
        left |= {name: name for name in self._passed_over(found) if name not in left}
        if not self.others:
            return left
        found.layers = {name: layer for name, layer in found.layers.items() if self._beside(name)}
        return {name: why for name, why in left.items() if self._beside(name) and name not in found.aside}

    def _beside(self, name: str) -> bool:
        """Whether a module stands beside the layers that another door has, and is no whole with some of them."""
        return name in self.candidates or (name != "" and apart(name, self.others))

    def _said(self, name: str, why: str) -> str:
        return f"{name} ({type(self.model.get_submodule(name)).__name__}{f': {why}' if why else ''})"

    def _passed_over(self, found: Found) -> Iterator[str]:
        """Modules of a model of transformers whose code has a softmax, that ran, and in which nobody saw a map."""
        known = (*found.layers, *found.own)
        for name, module in leftovers(self.model).items() if isinstance(self.model, PreTrainedModel) else ():
            if module in found.ran and not any(within(a, (b,)) for x in known for a, b in ((x, name), (name, x))):
                yield name

    def is_layer(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a module is an attention layer; it is looked at, with what it is called with, if it was not yet."""
        if bound.name not in self.found.layers and bound.name not in self._around:
            self._reach(bound, args, kwargs)
        return bound.name not in self._around

    def unforeseen(self, name: str, why: str, around: nn.Module | None) -> RefusedModel:
        """What is said of a module that turns out to compute attention while others are served."""
        if around is not None:
            return outside(around, self.model, name)
        return self._unreached(name, f"{why}; `inputs` would show whether it can be served")

    def _reach(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Learn how a module computes that is known by its class, or refuse it."""
        self.hooks.looking = True
        try:
            seen = find(bound.module, self._stood[bound.name].own, (args, kwargs), alone=True)
        finally:
            self.hooks.looking = False
        inside = [f"{bound.name}.{name}" for name in seen.layers if name]
        if "" in seen.layers:
            self.found.take(bound.name, seen)
            try:
                self._follow(bound)
            except BaseException:
                del self.found.layers[bound.name]  # the next call of it is refused as this one is
                raise
        elif inside and not seen.own and set(inside) <= set(self.candidates):
            self._around.add(bound.name)
        else:
            why = next(iter(seen.own.values()), f"its attention is in {inside[0]}" if inside else "")
            raise self._unreached(bound.name, why)

    def _unreached(self, name: str, why: str) -> RefusedModel:
        served = self.run.layer_names
        unseen = [x for x in self.unseen(served) if x != name]
        said = [self._said(name, why)]
        return unreached(type(self.model).__name__, served, [name, *unseen], said, len(unseen))

    def unseen(self, served: Collection[str]) -> tuple[str, ...]:
        """Those of the layers that are known by their classes alone."""
        known = {*self.found.layers, *self._around}
        return tuple(name for name in self.candidates if name in served and name not in known)

    # into the model and out again

    def open(self, hooks: Hooks) -> None:
        """Be ready to stand in modules."""
        self.hooks = hooks
        for encoder in self.model.modules():  # its nested tensors would reach modules that take none
            if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
                self._nested.append(encoder)
                encoder.use_nested_tensor = False
        self.installed = True

    def bind(self, name: str) -> Bound:
        """What the run knows of a layer."""
        module = self.model.get_submodule(name)
        if spread_of(self.model, name) is not None:
            raise RefusedModel(
                f"{name} ({type(module).__name__}) computes attention by itself, and its heads are spread over "
                "processes; load the model whole"
            )
        return Bound(self, module, name, None, NATIVE, outside=True, taking=taking_of(module))  # type: ignore[arg-type]

    def stand(self, bound: Bound) -> None:
        """Stand in a layer."""
        entrance = self._stood[bound.name] = Entrance(bound.module, self, bound)
        self._entrances.stand(entrance)
        if bound.name in self.found.layers:
            self._follow(bound)

    def watch(self, name: str, module: nn.Module, around: nn.Module | None = None) -> None:
        """Stand in a module that may be a layer beside those that are served, or beside the whole model in another."""
        self._entrances.stand(Watched(module, self, name, around))

    def _follow(self, bound: Bound) -> None:
        """Answer as it is known now that the layer computes."""
        found, module = self.found, bound.module
        bound.taking = taking_of(module, bound.name in found.channels_first)
        bound.written, bound.heads_at = found.written.get(bound.name), found.heads_at.get(bound.name)
        output = output_module(self.model, bound.name)
        if output is not None and output not in found.ran and (not self.candidates or output in set(module.modules())):
            output = module  # it multiplies with its projection's weight
        bound.output = output
        if self.run.stack.touches(Site.BLOCK, Site.OUTPUT):
            self.hooks.after_projection(self.model, bound)

    def close(self) -> None:
        self.installed = False
        while self._nested:
            self._nested.pop().use_nested_tensor = True
        self._entrances.remove()

    # one attention call

    @property
    def answering(self) -> bool:
        """Whether a run computes what it answers, with the same operations that it follows in modules."""
        return self.hooks.acting or self.hooks.looking

    def same_thread(self, bound: Bound) -> None:
        """A forward is followed in one thread."""
        if self.hooks.forwards.elsewhere:
            raise NotEntered(
                f"{bound.name} ({bound.kind}) runs in another thread than the forward that it belongs to, where "
                "heedful does not follow a model; run it in one thread"
            )

    def kernel(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`F.scaled_dot_product_attention`, as the run has it."""
        found = None if self.answering else self.attention(bound, by_name(args, kwargs))
        if found is not None:
            return found[0]
        with self.hooks.acts():  # a module around this one may be served
            return SDPA(*args, **kwargs)

    def written(self, bound: Bound, asked: Asked | str) -> tuple[Tensor, Tensor | None] | None:
        """A product of weights and values, as the run has it, and the weights where the module gives some."""
        if isinstance(asked, str):
            raise NotEntered(otherwise(bound, asked))
        given = bool(bound.written)
        found = self.attention(bound, asked.given(), given and self.hooks.forwards.patterns, unasked=given)
        return None if found is None else (asked.given_back(found[0]), found[1])

    def function(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`F.multi_head_attention_forward`, as the run has it."""

        def kernel(given: dict[str, Any], pattern: bool) -> tuple[Tensor, Tensor | None]:
            found = self.attention(bound, given, pattern, appends=True)
            if found is None and pattern:
                raise Untouched
            return (SDPA(**given), None) if found is None else found

        return MULTI_HEAD(*args, **kwargs) if self.answering else through_kernel(kernel, args, kwargs)

    def attention(
        self,
        bound: Bound,
        given: dict[str, Any],
        pattern: bool = False,
        appends: bool = False,
        unasked: bool = False,
    ) -> tuple[Tensor, Tensor | None] | None:
        """What comes out in the layout of the queries, and the pattern in the same where that is wanted.

        None where the model's own attention gives just that.
        """
        if bound.called:
            raise NotEntered(
                f"{bound.name} ({bound.kind}) calls attention twice in one forward, which it did not when heedful "
                "looked; give inputs that show what it does: attach(..., inputs=...)"
            )
        bound.called = True
        run, number = self.run, bound.number or 0
        run.state.entered[number] += 1
        hidden = bound.hidden
        layout = self._layout(bound, given["query"])
        q, k, v = (layout.fold(given[name], keys=name != "query") for name in ("query", "key", "value"))
        k, v = same_rows(k, len(q)), same_rows(v, len(q))
        if q.shape[1] != (known := self.found.layers[bound.name].heads):
            raise NotEntered(otherwise(bound, f"{q.shape[1]} heads, which were {known}"))
        operands, call = self._call(bound, layout, given, (q, k, v), appends)
        roles = {**halves(bound, k.shape[2]), **self.hooks.forwards.roles(bound, k.shape[2])}
        ids = self.hooks.forwards.ids(bound, len(q), q.shape[2])
        call = bound.call = replace(call, hidden=rows_of(hidden, q), ids=ids, roles=roles)
        plan = plan_of(run, call)
        operands = replace(operands, pattern=pattern, unasked=unasked)
        if (seen := replaced_whole(run, plan, call, operands)) is not None:
            bound.call = seen
            return layout.unfold(no_heads(q, v).transpose(1, 2)), None
        if (bound.merges is None or bound.merges.even) and left_alone(run, plan):
            run.state.backends[number] = f"the model's own ({NATIVE})"
            return None
        with self.hooks.acts():  # the kernels call torch's attention too, and a module around this one may be served
            heads, weights, job = computed(run, plan, call, operands)
        run.state.close_call(plan, job.call)
        return layout.unfold(heads.to(q.dtype)), None if weights is None else layout.unfold(weights.to(q.dtype))

    def _layout(self, bound: Bound, query: Tensor) -> Layout:
        told, rows = heads_told(bound.module), rows_in(bound.hidden)
        layout = Layout.of(query, told, bound.hidden, bound.heads_at)
        if layout.split is not None and bound.heads_at is None and layout.open(told, rows):
            raise NotEntered(
                f"{bound.name} ({bound.kind}) has {rows} texts and {told} heads in one axis, and one text when heedful "
                "looked, which did not tell which stand first; look at several: attach(..., inputs=...)"
            )
        if layout.shared(told, rows) and layout.axis != bound.heads_at:
            raise NotEntered(otherwise(bound, SHARED))
        return layout

    def _call(
        self, bound: Bound, layout: Layout, given: dict[str, Any], qkv: tuple[Tensor, Tensor, Tensor], appends: bool
    ) -> tuple[Operands, Call]:
        q, k, v = qkv
        causal, mask, scale = (given.get(name) for name in ("is_causal", "attn_mask", "scale"))
        rules, bias, text = rules_of(None if mask is None else layout.fold(mask), bool(causal), len(q), k.shape[2])
        queries, keys, bound.cross = places(bound, q, k, text, fixed=bool(causal) or appends)
        if bound.merges is not None and not bound.cross:
            require_no_table(bound, mask)
            queries = keys = bound.merges.places
        ordered, home = self.run.state.now.causal, list_of(bound.name)
        if not bound.cross and home not in ordered and hides_later(rules):
            ordered.add(home)
        call = replace(
            bound.outline, heads=q.shape[1], kv_heads=k.shape[1], queries=queries, keys=keys,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale), phase=Phase.of(queries),
            denoising=self.run.state.denoising, cross=bound.cross, training=bound.module.training, mask=rules,
            forward=max(0, self.run.state.now.number), batch=len(q), sizes=bound.sizes,
            in_order=bound.cross and home in ordered,
        )  # fmt: skip
        return Operands(q, k, v, bias, None, float(given.get("dropout_p") or 0.0)), call
