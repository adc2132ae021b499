"""Into any model whose modules call torch's own attention, or write it out: timm, diffusers, open_clip, plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from heedful.adapters.answering import Operands, computed, left_alone, no_heads, plan_of, replaced_whole, rows_of
from heedful.adapters.bound import Bound, let_go, require_free, take
from heedful.adapters.compiled import WrittenCalls
from heedful.adapters.hooked import Hooked
from heedful.adapters.hooks import Hooks
from heedful.adapters.layers import heads_told, highest, leftovers, list_of, lowest, output_module, served, within
from heedful.adapters.merging import require_no_table
from heedful.adapters.operations.entering import Entrance, otherwise
from heedful.adapters.operations.finding import MULTI_HEAD, SDPA, Found, find, named, taking_of
from heedful.adapters.operations.layout import Layout, same_rows
from heedful.adapters.operations.multi_head import Untouched, through_kernel
from heedful.adapters.operations.torch_masks import halves, hides_later, places, rules_of
from heedful.adapters.operations.written import Asked
from heedful.adapters.planted import Planted
from heedful.adapters.saving import Saving, adopted
from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError, NotEntered, RefusedModel
from heedful.core.method import Layer, Stack
from heedful.core.sites import Site
from heedful.engine.run import Run

NATIVE = "torch's own"


@dataclass(eq=False)
class SdpaAdapter:
    """Gets a run into one model, whose layers are found as it runs."""

    model: nn.Module
    only: tuple[str, ...] | None = None
    inputs: Any = None  # what the model is called with, or what calls it; None: the first forward tells
    shared_by: str = ""  # what shares its gradients with other processes, as far as they were known at the start
    installed: bool = field(default=False, init=False)
    _found: Found | None = field(default=None, init=False)
    _names: tuple[str, ...] = field(default=(), init=False)
    _calls: WrittenCalls = field(default_factory=WrittenCalls, init=False)
    _entrances: Hooked = field(default_factory=Hooked, init=False)
    _nested: list[nn.TransformerEncoder] = field(default_factory=list, init=False)
    _waiting: Hooked = field(default_factory=Hooked, init=False)

    def __post_init__(self) -> None:
        self.planted = Planted(self.model, shared_by=self.shared_by)
        self._saving = Saving(self.model, self.only)
        require_free(self.model, self.model.modules())  # else the dry run would see what the other run computes
        if self.inputs is not None:
            self.look(self._as_asked)

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    def _as_asked(self) -> Any:
        if isinstance(self.inputs, Mapping):
            return self.model(**self.inputs)
        if isinstance(self.inputs, tuple):
            return self.model(*self.inputs)
        return self.inputs() if callable(self.inputs) else self.model(self.inputs)

    def look(self, run: Callable[[], Any]) -> None:
        """Learn from one forward which modules are attention layers."""
        found = find(self.model, run)
        kinds = {name: type(self.model.get_submodule(name)).__name__ for name in found.own}
        left = {name: f"{name} ({kinds[name]}: {why})" for name, why in found.own.items()}
        if isinstance(self.model, PreTrainedModel):
            left |= {name: name for name in self._passed_over(found)}
        none = (
            "calls no attention of torch's (F.scaled_dot_product_attention, nn.MultiheadAttention) that heedful reaches"
            ", and writes none out that it can follow"
        )
        self._names = served(self.kind, found.layers, left, self.only, none)
        self.planted.paths = dict(enumerate(self._names))
        self._found = found

    def _passed_over(self, found: Found) -> Iterator[str]:
        """Modules whose code has a softmax, that ran, and in which nobody saw a map."""
        known = (*found.layers, *found.own)
        for name, module in leftovers(self.model).items():
            if module in found.ran and not any(within(a, (b,)) for x in known for a, b in ((x, name), (name, x))):
                yield name

    # what a run asks

    @property
    def ready(self) -> bool:
        return self._found is not None

    def _known(self) -> Found:
        if self._found is None:
            rule = f"the layers of {self.kind} are known once it has run: call it, or say what it is called with"
            raise FieldError("attach()", "inputs", None, rule, "images")
        return self._found

    @property
    def layer_names(self) -> tuple[str, ...]:
        self._known()
        return self._names

    def sizes(self) -> tuple[Layer, ...]:
        found = self._known()
        last = highest(self._names)
        return tuple(replace(found.layers[name], number=i, highest=last[i]) for i, name in enumerate(self._names))

    def adopted(self, stack: Stack) -> int:
        return adopted(self.model, stack, self.only) if isinstance(self.model, PreTrainedModel) else 0

    # into the model and out again

    def install(self, run: Run) -> None:
        self.run = run
        if run.stack.touches(Site.CACHE):
            raise RefusedModel(
                f"a CACHE edit cannot act in {self.kind}: it keeps no cache that heedful knows, or lays a mask over "
                "its keys by itself, which does not fit once some are gone"
            )
        require_free(self.model, self.model.modules())
        self._hooks = Hooks(run, len(self._names))
        try:
            take(self.model.modules(), self)
            self._hooks.forwards({"": self.model})
            if self.ready:
                self._enter()
            else:
                self._hooks.first = self._first
                for name, module in self.model.named_modules():
                    if name and not isinstance(module, nn.ModuleList):
                        self._waiting.before(module, self._too_early)
            self._saving.begin(run)
            self.installed = True
        except BaseException:
            self.remove()
            raise

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the model with what its first forward is given, and go in."""
        args = tuple(map(_unspent, args))
        kwargs = {name: _unspent(x) for name, x in kwargs.items()}
        self.look(lambda: self.model.forward(*args, **kwargs))
        if "" in self._names:
            rule = f"{self.kind} is an attention module itself, which must be known before it runs"
            raise FieldError("attach()", "inputs", None, rule, "(x, x, x)")
        self._hooks.first = None
        self._waiting.remove()
        self.run.settle()
        self._hooks.layers = len(self._names)
        self._enter()

    def _too_early(self, module: nn.Module, *_: Any) -> None:
        if not self._hooks.under_way:
            raise NotEntered(
                f"a {type(module).__name__} of {self.kind} was called by itself, before heedful knows the layers; "
                "call the whole model first, or give what to call: attach(..., inputs=lambda: model.encode_image(x))"
            )

    def _enter(self) -> None:
        """Stand in every served module."""
        hooks, run, found = self._hooks, self.run, self._known()
        parts = {name.partition(".")[0] for name in self._names if "." in name}
        children = {name: module for name, module in self.model.named_children() if name in parts}
        hooks.forwards({n: m for n, m in children.items() if not isinstance(m, nn.ModuleList)})
        bounds = []
        first, last = lowest(self._names), highest(self._names)
        for number, name in enumerate(self._names):
            module = self.model.get_submodule(name)
            output = output_module(self.model, name)
            if output is not None and output not in found.ran:
                output = module  # it multiplies with its projection's weight
            bound = Bound(self, module, name, number, NATIVE, first[number], taking=taking_of(module), output=output)  # type: ignore[arg-type]
            bound.highest, bound.written = last[number], found.written.get(name)
            hooks.around(bound)
            self._entrances.stand(Entrance(module, self, bound))
            bounds.append(bound)
            if run.stack.touches(Site.BLOCK, Site.OUTPUT):
                hooks.after_projection(self.model, bound)
        hooks.stream(self.model, bounds)
        for encoder in self.model.modules():  # its nested tensors would reach modules that take none
            if isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor:
                self._nested.append(encoder)
                encoder.use_nested_tensor = False
        self._calls.lead_past(self.model)

    def remove(self) -> None:
        self.installed = False
        self._calls.undo()
        self._waiting.remove()
        while self._nested:
            self._nested.pop().use_nested_tensor = True
        if hasattr(self, "_hooks"):
            self._hooks.remove()
        self._entrances.remove()
        self._saving.pause()
        let_go(self.model.modules(), self)

    def leave(self) -> None:
        self.remove()
        self._saving.end()
        self.planted.drop()

    # one attention call

    @property
    def answering(self) -> bool:
        """Whether a run computes what it answers, with the same operations that it follows in modules."""
        return self._hooks.acting

    def same_thread(self, bound: Bound) -> None:
        """A forward is followed in one thread."""
        if self._hooks.elsewhere:
            raise NotEntered(
                f"{bound.name} ({bound.kind}) runs in another thread than the forward that it belongs to, where "
                "heedful does not follow a model; run it in one thread"
            )

    def kernel(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`F.scaled_dot_product_attention`, as the run has it."""
        found = None if self.answering else self.attention(bound, named(args, kwargs))
        return SDPA(*args, **kwargs) if found is None else found[0]

    def written(self, bound: Bound, asked: Asked | str) -> tuple[Tensor, Tensor | None] | None:
        """A product of weights and values, as the run has it, and the weights where the module gives some."""
        if isinstance(asked, str):
            raise NotEntered(otherwise(bound, asked))
        given = bool(bound.written)
        found = self.attention(bound, asked.given(), given and self._hooks.patterns, unasked=given)
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
        layout = Layout.of(given["query"], heads_told(bound.module), hidden)
        q, k, v = (layout.fold(given[name], keys=name != "query") for name in ("query", "key", "value"))
        k, v = same_rows(k, len(q)), same_rows(v, len(q))
        operands, call = self._call(bound, layout, given, (q, k, v), appends)
        roles = {**halves(bound, k.shape[2]), **self._hooks.roles(bound, k.shape[2])}
        ids = self._hooks.ids(bound, len(q), q.shape[2])
        call = bound.call = replace(call, hidden=rows_of(hidden, q), ids=ids, roles=roles)
        plan = plan_of(run, call)
        operands = replace(operands, pattern=pattern, unasked=unasked)
        if (seen := replaced_whole(run, plan, call, operands)) is not None:
            bound.call = seen
            return layout.unfold(no_heads(q, v).transpose(1, 2)), None
        if (bound.merges is None or bound.merges.even) and left_alone(run, plan):
            run.state.backends[number] = f"the model's own ({NATIVE})"
            return None
        self._hooks.acting = True  # the kernels call torch's attention too, and a module around this one may be served
        try:
            heads, weights, job = computed(run, plan, call, operands)
        finally:
            self._hooks.acting = False
        run.state.close_call(plan, job.call)
        return layout.unfold(heads.to(q.dtype)), None if weights is None else layout.unfold(weights.to(q.dtype))

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
        call = Call(
            bound.number or 0, len(self._names), bound.name, q.shape[1], k.shape[1], queries, keys,
            q.shape[-1] ** -0.5 if scale is None else float(scale), None, Phase.of(queries),
            self.run.state.denoising, bound.cross, bound.module.training, mask=rules,
            forward=max(0, self.run.state.now.number), lowest=bound.lowest, highest=bound.highest, batch=len(q),
            sizes=bound.sizes, in_order=bound.cross and home in ordered,
        )  # fmt: skip
        return Operands(q, k, v, bias, None, float(given.get("dropout_p") or 0.0)), call


def _unspent(x: Any) -> Any:
    """What a forward is given, but for copies of caches that it would write to."""
    if type(x) is dict:
        return {name: _unspent(one) for name, one in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_unspent, x))
    return copy.deepcopy(x) if isinstance(x, Cache) else x
