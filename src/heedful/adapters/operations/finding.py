"""A dry run: which modules of a model call torch's attention, and which compute a map where nobody sees it.

Modules are told apart by what they do while the model runs once, whatever library they come from: the innermost module
around a call of `F.scaled_dot_product_attention` or `F.multi_head_attention_forward` is an attention layer, and so is
one that multiplies values with the softmax of a product, where all that it does in between can be followed
(`written.py`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import get_ident
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heedful.adapters.compiled import WrittenCalls
from heedful.adapters.hooked import Hooked
from heedful.adapters.operations.layout import Layout, rows_in
from heedful.adapters.operations.products import PRODUCTS
from heedful.adapters.operations.scores import Asked
from heedful.adapters.operations.written import Trail
from heedful.adapters.projections import heads_told
from heedful.adapters.taking import Taking, put, stream_of
from heedful.core.entry import Layer
from heedful.core.errors import RefusedModel
from heedful.engine.leaving import as_it_was
from heedful.engine.resting import undone

SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention
MULTI_HEAD: Callable[..., Any] = F.multi_head_attention_forward
MULTI_HEAD_SIGNATURE = inspect.signature(MULTI_HEAD)
# diffusers' attention backends that call `F.scaled_dot_product_attention`
DIFFUSERS_OWN = frozenset({"native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn"})
SHARED = "texts and heads share an axis, beside one of something else, as of windows"
OF_GRID = "an axis of frames or windows stands where heads would"
NOT_TOLD = "its sizes do not tell whether heads or texts stand first, which another number of texts may"
SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of its positional arguments


def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `scaled_dot_product_attention` by name."""
    return dict(zip(SDPA_NAMES, args, strict=False)) | kwargs


@dataclass(frozen=True)
class Seen:
    """One call of torch's attention in the dry run."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int | None  # None where a module's own function was seen, and not its kernel
    rows: int
    value: int  # the memory of the values


@dataclass(frozen=True, eq=False)
class Open:
    """What a module whose sizes do not tell where its heads are does the first time."""

    layout: Layout
    told: int | None
    stream: Tensor | None
    query: Tensor
    key: Tensor

    def changed(self) -> Tensor | None:
        """Its stream with another token in the first row."""
        if self.stream is None or not self.stream.is_floating_point():
            return None
        new = self.stream.clone()
        token = new if new.ndim < 2 else new[-1] if new.ndim == 2 else new[0, -1] if new.ndim == 3 else new[0, -1, -1]
        for x in (token, new[0, ..., -1, -1]) if new.ndim > 3 else (token,):  # of a grid, channels may stand before it
            x.copy_(x.flip(-1) + torch.linspace(0.5, 1.5, x.shape[-1], device=x.device))
        return new

    @property
    def why(self) -> str:
        """What is said of it where that does not tell."""
        if self.layout.of_grid:
            return OF_GRID
        return SHARED if self.layout.shared(self.told, rows_in(self.stream)) else NOT_TOLD

    def heads_at(self, other: Open | None) -> int | None:
        """Where the heads are, told by what it does with a stream so changed."""
        for mine, its in () if other is None else ((self.query, other.query), (self.key, other.key)):
            if mine.shape != its.shape or mine.shape[:-2] != self.query.shape[:-2] or torch.equal(mine, its):
                continue
            alike = (mine == its) | ((mine != mine) & (its != its))
            return self.layout.told_by(~alike.all(-1), self.told, rows_in(self.stream))
        return None


@dataclass
class Found:
    """What a dry run tells of a model."""

    layers: dict[str, Layer] = field(default_factory=dict)  # in the order in which they ran
    own: dict[str, str] = field(default_factory=dict)  # attention out of reach, with the reason
    aside: set[str] = field(default_factory=set)  # those of them that may be no attention
    written: dict[str, bool] = field(default_factory=dict)  # layers that write attention out; whether they give weights
    heads_at: dict[str, int] = field(default_factory=dict)  # which leading axis of a layer's queries holds its heads
    channels_first: set[str] = field(default_factory=set)  # layers that are handed [b e n]
    ran: set[nn.Module] = field(default_factory=set)

    def take(self, name: str, module: Found) -> None:
        """Know a layer by what was found in a look at that module alone."""
        self.layers[name] = module.layers[""]
        if "" in module.channels_first:
            self.channels_first.add(name)
        if "" in module.written:
            self.written[name] = module.written[""]
        if "" in module.heads_at:
            self.heads_at[name] = module.heads_at[""]
        self.ran |= module.ran


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Notes who calls what while a model runs."""

    model: nn.Module
    instead: dict[str, Tensor] = field(default_factory=dict)  # what modules are handed for their first streams
    heads_at: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.names = {module: name for name, module in reversed(list(self.model.named_modules()))}
        self.stack: list[nn.Module] = [self.model]
        self._before: list[frozenset[int]] = []  # scores that there were when each of these but the first began
        self.calls: dict[str, list[list[Seen]]] = {"": [[]]}  # by module, and by forward of it
        self.streams: dict[str, Tensor | None] = {}
        self.written: dict[str, bool] = {}
        self.own: dict[str, str] = {}
        self.aside: dict[str, str] = {}  # what is attention out of reach, where a module has no other
        self.open: dict[str, Open] = {}  # modules whose sizes do not tell where their heads are
        self.channels_first: set[str] = set()
        self.ran: set[nn.Module] = {self.model}
        self.handed: set[str] = set()  # modules that were handed another stream
        self._trail, self._depth = Trail(), 0  # of the module that made the last product
        self._thread = get_ident()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self._note_kernel(self.stack[-1], by_name(args, kwargs))
        elif func is MULTI_HEAD:
            seen = _function_call(MULTI_HEAD_SIGNATURE.bind(*args, **kwargs).arguments)
            self.calls[self._name][-1].append(seen)
        elif (asked := self._trail.asked(func, args, kwargs)) is not None:
            self._note_written(asked)
        elif self._trail.left_alone:
            self.aside[self._name], self._trail.left_alone = f"a softmax of its own: {self._trail.left_alone}", ""
        out = func(*args, **kwargs)
        self._trail.follow(func, args, kwargs, out)
        if func in PRODUCTS:  # a map within, written as a product, leaves weights that there are as they are
            self._depth = min(self._depth, len(self.stack)) if self._trail.weights else len(self.stack)
        return out

    def _note_written(self, asked: Asked | str) -> None:
        module = self.stack[self._depth - 1]  # a module inside may do no more than multiply
        name = self.names[module]
        if isinstance(asked, str):
            self.own.setdefault(name, f"a softmax of its own: {asked}")
            return
        self.written.setdefault(name, False)
        self._note_kernel(module, asked.operands)

    def _note_kernel(self, module: nn.Module, given: dict[str, Any]) -> None:
        name = self.names[module]
        stream, told = self.streams.get(name), heads_told(module)
        rows, query, at = rows_in(stream), given["query"], self.heads_at.get(name)
        layout = Layout.of(query, told, stream, at)
        if at is None and layout.open(told, rows) and not query.is_meta:  # there it is asked for sizes alone
            self.open.setdefault(name, Open(layout, told, stream, query, given["key"]))
        if layout.split is None or rows != 1:
            self.heads_at.setdefault(name, layout.axis)
        q, k = layout.fold(query), layout.fold(given["key"], keys=True)
        if stream is not None and _channels_first(stream, q):
            self.channels_first.add(name)
            self.streams[name] = stream.transpose(1, 2)
        value = given["value"]
        place = value.untyped_storage()._cdata + value.storage_offset()
        seen = Seen(q.shape[1], k.shape[1], q.shape[-1], value.shape[-1], len(q), q.shape[2], place)
        self.calls[name][-1].append(seen)

    @property
    def later(self) -> dict[str, str]:
        """What scores of modules are used for by others."""
        return self._trail.uses.later

    @property
    def _name(self) -> str:
        return self.names[self.stack[-1]]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.names[module]
        if get_ident() != self._thread:
            raise RefusedModel(
                f"{name} ({type(module).__name__}) runs in a thread of its own, where heedful does not follow a model; "
                "run it in one thread, as with DataParallel(..., device_ids=[0])"
            )
        self.stack.append(module)
        self._before.append(frozenset(self._trail.scores))
        self.ran.add(module)
        self.calls.setdefault(name, []).append([])
        stream, taking, again = stream_of(args, kwargs), taking_of(module), name in self.streams
        self.streams[name] = None if stream is None else taking.turned(stream)
        if stream is None or name not in self.instead or again or stream.shape != self.instead[name].shape:
            return None  # what came before it may have changed how long it is
        self.handed.add(name)
        self.streams[name] = self.instead[name]
        return put(taking.turned(self.instead[name]), args, kwargs)

    def leave(self, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        name, before = self.names[module], self._before.pop()
        if name in self.written:
            self.written[name] |= self._trail.gives((output, kept_by(module)))
            if self._trail.besides:
                self.own.setdefault(name, f"a softmax of its own: {self._trail.besides}")
            if self._trail.answered is not None:
                self._trail.answered.origin.left = name
        if len(self.stack) < self._depth:
            self._depth = len(self.stack)  # it multiplies for the one around it
            if not (isinstance(output, Tensor) and id(output) in self._trail.scores):
                self._trail.clear(before)  # or gives what is used there


def kept_by(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that a module keeps under names of its own, as some do with their last weights."""
    return {name: x for name, x in vars(module).items() if isinstance(x, Tensor)}


def _channels_first(stream: Tensor, q: Tensor) -> bool:
    """Whether a stream is `[b e n]`, for queries `[b h n d]`."""
    if stream.ndim != 3 or len(stream) != len(q) or stream.shape[1] in (q.shape[2], q.shape[3]):
        return False
    return stream.shape[2] == q.shape[2]


def _function_call(given: dict[str, Any]) -> Seen:
    heads = given["num_heads"]
    width, rows = given["embed_dim_to_check"] // heads, given["query"].shape[0]
    return Seen(heads, heads, width, width, None, rows, id(given["value"]))


def taking_of(module: nn.Module, channels_first: bool = False) -> Taking:
    """How a module is handed its stream, as it tells itself, but for what its queries tell."""
    return Taking(bool(getattr(module, "batch_first", True)), channels_first)


def find(model: nn.Module, run: Callable[..., Any], given: Any = None, alone: bool = False) -> Found:
    """Run a model, at rest and without gradients, and tell its attention layers; it is left as it was, as is `given`.

    Once, or up to three times where sizes do not tell which axis of its queries holds the heads; once more where a
    stream so changed makes those behind it longer or shorter. With `alone` what runs is a module's own forward, past
    its hooks, on the arguments `given`.
    """
    watch = _watched(_Watch(model), run, given, alone)
    if watch.open:
        changed = {name: x for name, one in watch.open.items() if (x := one.changed()) is not None}
        other, left = dict[str, Open](), changed
        while left:
            again = _watched(_Watch(model, left), run, given, alone)
            other = {name: x for name, x in again.open.items() if name in again.handed or name not in changed} | other
            left = {name: x for name, x in left.items() if name not in again.handed} if again.handed else {}
        told = {name: one.heads_at(other.get(name)) for name, one in watch.open.items()}
        if any(at not in (None, watch.heads_at[name]) for name, at in told.items()):
            known = {name: at for name, at in told.items() if at is not None}
            watch = _watched(_Watch(model, heads_at=known), run, given, alone)
        for name in (name for name, at in told.items() if at is None):
            watch.own.setdefault(name, watch.open[name].why)
    found = Found(written=watch.written, heads_at=watch.heads_at, channels_first=watch.channels_first, ran=watch.ran)
    for name, forwards in watch.calls.items():
        calls = [call for call in forwards if call]
        if not calls:
            continue
        stream = watch.streams.get(name)
        if (why := _obstacle(calls, stream, heads_told(model.get_submodule(name)))) is not None:
            found.own[name] = why
            continue
        seen = calls[0][0]
        width = int(stream.shape[-1]) if stream is not None and stream.ndim in (2, 3) else seen.heads * seen.value_dim
        found.layers[name] = Layer(len(found.layers), seen.heads, seen.kv_heads, seen.head_dim, seen.value_dim, width)
    found.own |= {name: why for name, why in watch.aside.items() if name not in found.layers}
    found.aside = set(found.own).intersection(watch.aside) - {*watch.later, *watch.own}
    found.own |= {name: f"a softmax of its own: {why}" for name, why in watch.later.items()}
    found.own |= watch.own | _scripted(model) | _other_kernel(model, found.layers)
    for name in found.own:
        found.layers.pop(name, None)
    found.layers = {name: replace(layer, number=i) for i, (name, layer) in enumerate(found.layers.items())}
    return found


def _watched(watch: _Watch, run: Callable[..., Any], given: Any, alone: bool) -> _Watch:
    """What is seen of one forward."""
    with as_it_was(watch.model, given), _hooked(watch.model, watch), torch.no_grad(), watch:
        if alone:
            args, kwargs = watch.enter(watch.model, *given) or given
            watch.leave(watch.model, run(*args, **kwargs))
        else:
            run()
    return watch


def _obstacle(forwards: list[list[Seen]], stream: Tensor | None, heads: int | None) -> str | None:
    """Why what a module does with torch's attention is no map of tokens."""
    most = max(map(len, forwards))
    if most > 1:
        values = [call.value for call in forwards[0]]
        how = "combined" if len(set(values)) < len(values) else "none of which is the layer's alone"
        return f"{most} calls in one forward, {how}"
    seen = forwards[0][0]
    if stream is not None and stream.ndim == 3 and seen.batch == len(stream):
        tokens, width = stream.shape[1:]
        if seen.rows != tokens and seen.head_dim == tokens and seen.heads * seen.rows == width:
            return "over channels, not over tokens"
        among = heads not in (None, seen.heads) and seen.heads * seen.rows == tokens * heads
        if heads is None and seen.heads == 1 and seen.rows > tokens:
            among = seen.rows % tokens == 0 and seen.rows * seen.head_dim == tokens * width
        if among:
            return "with heads in the rows of its queries"
    return None


def _scripted(model: nn.Module) -> dict[str, str]:
    """Compiled pieces that hold attention, which nobody sees from outside."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not any(name.startswith(f"{n}.") or not n for n in found):
            text = str(module.inlined_graph) if hasattr(module, "forward") else ""
            if "scaled_dot_product_attention" in text or ("aten::softmax" in text and "matmul" in text):
                found[name] = "scripted"
    return found


def _other_kernel(model: nn.Module, known: Iterable[str]) -> dict[str, str]:
    """Modules that hand their attention to a kernel that is not torch's, with the reason."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return {}
    served, found = set(known), {}
    everywhere = dispatch._AttentionBackendRegistry.get_active_backend()[0]
    for name, module in model.named_modules():
        processor: Any = getattr(module, "processor", None)
        if name in served or not hasattr(processor, "_attention_backend"):
            continue
        chosen = getattr(processor._attention_backend or everywhere, "value", None)
        if chosen is not None and chosen not in DIFFUSERS_OWN:
            found[name] = f"attention backend {chosen!r}; model.set_attention_backend('native')"
    return found


@contextmanager
def _hooked(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Hooks on all modules; they also keep torch's encoder layers from their fast path, which calls no module."""
    hooked, written = Hooked(), WrittenCalls()
    nested = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]

    def undo() -> None:
        written.undo()
        for encoder in nested:
            encoder.use_nested_tensor = True
        hooked.remove()

    with undone(undo):
        for module in watch.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            hooked.before(module, watch.enter)
            hooked.after(module, lambda m, _, output: watch.leave(m, output), always_call=True)
        for encoder in nested:
            encoder.use_nested_tensor = False
        written.lead_past(model)
        yield
