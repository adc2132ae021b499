"""Into any model, by two doors: transformers' attention interface, and torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from heedful.adapters.bound import let_go, require_free, take
from heedful.adapters.compiled import WrittenCalls
from heedful.adapters.hooked import Hooked
from heedful.adapters.hooks import Hooks
from heedful.adapters.interface import Interface
from heedful.adapters.layers import highest, leftovers, lowest, served, suspects, within
from heedful.adapters.operations.door import Operations
from heedful.adapters.planted import Planted
from heedful.adapters.projections import size_of
from heedful.adapters.saving import Saving, adopted
from heedful.adapters.spread import spread_of
from heedful.adapters.wrapped import beside
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, NotEntered, RefusedModel
from heedful.core.method import Stack
from heedful.core.sites import Site
from heedful.engine.run import Run

NO_INTERFACE = "has no attention layer that goes through transformers' attention interface"
NO_OPERATION = (
    "calls no attention of torch's (F.scaled_dot_product_attention, nn.MultiheadAttention) that heedful reaches, and "
    "writes none out that it can follow"
)


@dataclass(eq=False)
class ModelAdapter:
    """Gets a run into one model.

    Where some layers go through transformers' interface, those beside them are known by their classes. In any other
    model they are found as it runs.
    """

    model: nn.Module
    only: tuple[str, ...] | None = None
    inputs: Any = None  # what the model is called with, or what calls it; None: the first forward tells
    shared_by: str = ""  # what shares its gradients with other processes, as far as they were known at the start
    around: nn.Module | None = None  # what it is inside of, or itself
    installed: bool = field(default=False, init=False)
    _names: tuple[str, ...] = field(default=(), init=False)
    _calls: WrittenCalls = field(default_factory=WrittenCalls, init=False)
    _waiting: Hooked = field(default_factory=Hooked, init=False)
    _hooks: Hooks | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.planted = Planted(self.model, shared_by=self.shared_by)
        self._saving = Saving(self.model, self.only)
        self._interface = Interface(self.model)
        through = self._interface.layers
        own = leftovers(self.model) if isinstance(self.model, PreTrainedModel) else {}
        self._known = tuple(n for n, _ in self.model.named_modules() if through and (n in through or n in own))
        self._operations = Operations(self.model, tuple(own) if through else (), tuple(through))
        if through or (isinstance(self.model, PreTrainedModel) and not own):
            self._know(self._known, {}, NO_INTERFACE)
        if self.inputs is not None and self.ready and all(n in through for n in self._names) and not self._suspects():
            rule = "tells the layers of other models; those that go through transformers' interface are known"
            raise FieldError("attach()", "inputs", type(self.inputs).__name__, rule, None)
        if self.inputs is not None or not self.ready:  # else a look would see what another run computes
            require_free(self.model, self.model.modules())
        if self.inputs is not None:
            self.look(self._as_asked, self.inputs)

    @property
    def kind(self) -> str:
        return type(self.model).__name__

    def _as_asked(self) -> Any:
        if isinstance(self.inputs, Mapping):
            return self.model(**self.inputs)
        if isinstance(self.inputs, tuple):
            return self.model(*self.inputs)
        return self.inputs() if callable(self.inputs) else self.model(self.inputs)

    def look(self, run: Callable[[], Any], given: Any = None) -> None:
        """Learn from a forward which modules are attention layers; what it is given is left as it was."""
        left = self._operations.look(run, given)
        if self._known:
            new = {*self._known, *self._operations.found.layers}
            self._known = tuple(name for name, _ in self.model.named_modules() if name in new)
        self._know(self._known or self._operations.found.layers, left, NO_OPERATION)

    def _suspects(self) -> dict[str, nn.Module]:
        """Modules beside layers of the interface that may be some too, though nothing says that they are."""
        found = suspects(self.model, self._known) if self._interface.layers else {}
        return {name: module for name, module in found.items() if within(name, self.only)}

    def _know(self, layers: Iterable[str], left: Mapping[str, str], none: str) -> None:
        self._names = served(self.kind, layers, left, self.only, none)
        self.planted.paths = dict(enumerate(self._names))

    # what a run asks

    @property
    def ready(self) -> bool:
        return bool(self._names)

    @property
    def layer_names(self) -> tuple[str, ...]:
        if not self.ready:
            rule = (
                f"the layers of {self.kind} are known once it has run: call it, or say what it is called with; "
                "`heedful compare --tasks scenes` calls the small denoiser, `heedful diagnose --prompts` a pipeline"
            )
            raise FieldError("attach()", "inputs", None, rule, "images")
        return self._names

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers that compute attention by themselves, and will be looked at when they are first reached."""
        return self._operations.unseen(self._names)

    def sizes(self, layers: Collection[int] | None = None) -> tuple[Layer, ...]:
        names, seen = self.layer_names, self._operations.found.layers
        last = highest(names)
        return tuple(
            replace(seen.get(names[i]) or size_of(self.model, names[i], i), number=i, highest=last[i])
            for i in (range(len(names)) if layers is None else layers)
        )

    def heads(self, layer: int) -> int | None:
        name = self.layer_names[layer]
        if (seen := self._operations.found.layers.get(name)) is not None:
            return seen.heads
        try:
            spread = spread_of(self.model, name)
            return size_of(self.model, name, layer).heads if spread is None else spread.heads
        except RefusedModel:
            return None

    def adopted(self, stack: Stack) -> int:
        return adopted(self.model, stack, self.only) if isinstance(self.model, PreTrainedModel) else 0

    # into the model and out again

    def install(self, run: Run) -> None:
        self.run, through = run, self._interface.layers
        if not through and run.stack.touches(Site.CACHE):
            raise RefusedModel(
                f"a CACHE edit cannot act in {self.kind}: it keeps no cache that heedful knows, or lays a mask over "
                "its keys by itself, which does not fit once some are gone"
            )
        own = [self.model.get_submodule(name) for name in self._names if name not in through]
        whole = self.model if self.around is None else self.around  # a compiled model has no truth value
        watched, apart = self._suspects(), beside(whole, self.model) if self.only is None else {}
        require_free(self.model, [*through.values(), *own] if through else self.model.modules())
        hooks = self._hooks = Hooks(run, len(self._names))
        try:
            if through:
                self._interface.open(hooks)
            if own or watched or apart or not through:
                self._operations.open(hooks)
            for name, module in watched.items():
                self._operations.watch(name, module)
            for name, module in apart.items():
                self._operations.watch(name, module, self.around)
            if not through:  # any module may turn out to be a layer
                take(self.model.modules(), self._operations)
            inner = self.model.named_modules() if through else ()
            hooks.around_forwards({"": self.model} | {n: m for n, m in inner if isinstance(m, PreTrainedModel)})
            if self.ready:
                self._enter(hooks)
            else:
                hooks.forwards.first = self._first
                for name, module in self.model.named_modules():
                    if name and not isinstance(module, nn.ModuleList):
                        self._waiting.before(module, self._too_early)
            self._saving.begin(run)
            self.installed = True
        except BaseException:
            self.remove()
            raise

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the model with what its first forward is given, and go in; or wait for another, where that fails."""
        hooks = self._operations.hooks
        try:
            self.look(lambda: self.model.forward(*args, **kwargs), (args, kwargs))
            if "" in self._names:
                rule = f"{self.kind} is an attention module itself, which must be known before it runs"
                raise FieldError("attach()", "inputs", None, rule, "(x, x, x)")
            hooks.forwards.first = None
            self._waiting.remove()
            self.run.settle()
            hooks.layers = len(self._names)
            self._enter(hooks)
        except BaseException:
            self.remove()
            self._names = ()
            self.install(self.run)
            raise

    def _too_early(self, module: nn.Module, *_: Any) -> None:
        if not self._operations.hooks.forwards.under_way:
            raise NotEntered(
                f"a {type(module).__name__} of {self.kind} was called by itself, before heedful knows the layers; "
                "call the whole model first, or give what to call: attach(..., inputs=lambda: model.encode_image(x))"
            )

    def _enter(self, hooks: Hooks) -> None:
        """Stand in every layer; in one that is not served too, if it asks for its attention by heedful's name."""
        through = self._interface.layers
        if not through:
            parts = {name.partition(".")[0] for name in self._names if "." in name}
            children = {name: module for name, module in self.model.named_children() if name in parts}
            hooks.around_forwards({n: m for n, m in children.items() if not isinstance(m, nn.ModuleList)})
        numbers = {name: i for i, name in enumerate(self._names)}
        first, last = lowest(self._names), highest(self._names)
        bounds = []
        for name in self._known or self._names:
            if name not in numbers and name not in through:
                continue
            door = self._interface if name in through else self._operations
            bound = door.bind(name)
            if (number := numbers.get(name)) is not None:
                bound.number, bound.lowest, bound.highest = number, first[number], last[number]
                bounds.append(bound)
            hooks.around(bound)
            take([bound.module], bound)
            door.stand(bound)
        hooks.stream(self.model, bounds)
        self._calls.lead_past(self.model)

    def remove(self) -> None:
        self.installed = False
        self._calls.undo()
        self._waiting.remove()
        self._operations.close()
        if self._hooks is not None:  # an attach may end before it has any
            self._hooks.remove()
        self._saving.pause()
        self._interface.close()
        for door in (self._operations, self._interface):
            let_go(self.model.modules(), door)

    def leave(self) -> None:
        self.remove()
        self._saving.end()
        self.planted.drop()
