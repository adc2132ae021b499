"""A dry run: which modules of a model call torch's attention, and which compute a map where nobody sees it.

Modules are told apart by what they do while the model runs once, whatever library they come from: the innermost module
around a call of `F.scaled_dot_product_attention` or `F.multi_head_attention_forward` is an attention layer, and so is
one that multiplies values with the softmax of a product, where all that it does in between can be followed
(`written.py`).
"""

from __future__ import annotations

import inspect
import sys
import warnings
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
from heedful.adapters.layers import heads_told
from heedful.adapters.operations.layout import Layout
from heedful.adapters.operations.products import PRODUCTS
from heedful.adapters.operations.written import Asked, Trail
from heedful.adapters.taking import Taking, stream_of
from heedful.core.errors import RefusedModel
from heedful.core.method import Layer
from heedful.engine.kept import Kept
from heedful.engine.resting import resting, undone

SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention
MULTI_HEAD: Callable[..., Any] = F.multi_head_attention_forward
MULTI_HEAD_SIGNATURE = inspect.signature(MULTI_HEAD)
# diffusers' attention backends that call `F.scaled_dot_product_attention`
DIFFUSERS_OWN = frozenset({"native", "_native_math", "_native_flash", "_native_efficient", "_native_cudnn"})
SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # of its positional arguments


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
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


@dataclass
class Found:
    """What a dry run tells of a model."""

    layers: dict[str, Layer] = field(default_factory=dict)  # in the order in which they ran
    own: dict[str, str] = field(default_factory=dict)  # attention out of reach, with the reason
    written: dict[str, bool] = field(default_factory=dict)  # layers that write attention out; whether they give weights
    ran: set[nn.Module] = field(default_factory=set)


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Notes who calls what while a model runs."""

    model: nn.Module

    def __post_init__(self) -> None:
        super().__init__()
        self.names = {module: name for name, module in reversed(list(self.model.named_modules()))}
        self.stack: list[nn.Module] = [self.model]
        self.calls: dict[str, list[list[Seen]]] = {"": [[]]}  # by module, and by forward of it
        self.streams: dict[str, Tensor | None] = {}
        self.written: dict[str, bool] = {}
        self.own: dict[str, str] = {}
        self.ran: set[nn.Module] = {self.model}
        self._trail, self._depth = Trail(), 0  # of the module that made the last product
        self._thread = get_ident()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            self._note(_kernel_call(self.stack[-1], self.streams.get(self._name), named(args, kwargs)))
        elif func is MULTI_HEAD:
            self._note(_function_call(MULTI_HEAD_SIGNATURE.bind(*args, **kwargs).arguments))
        elif (asked := self._trail.asked(func, args, kwargs)) is not None:
            self._note_written(asked)
        out = func(*args, **kwargs)
        self._trail.follow(func, args, kwargs, out)
        if func in PRODUCTS:  # a map within, written as a product, leaves weights that there are as they are
            self._depth = min(self._depth, len(self.stack)) if self._trail.weights else len(self.stack)
        return out

    def _note_written(self, asked: Asked | str) -> None:
        if isinstance(asked, str):
            self.own.setdefault(self._name, f"a softmax of its own: {asked}")
            return
        self.written.setdefault(self._name, False)
        self._note(_kernel_call(self.stack[-1], self.streams.get(self._name), asked.operands))

    @property
    def _name(self) -> str:
        return self.names[self.stack[-1]]

    def _note(self, seen: Seen) -> None:
        self.calls[self._name][-1].append(seen)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self.names[module]
        if get_ident() != self._thread:
            raise RefusedModel(
                f"{name} ({type(module).__name__}) runs in a thread of its own, where heedful does not follow a model; "
                "run it in one thread, as with DataParallel(..., device_ids=[0])"
            )
        self.stack.append(module)
        self.ran.add(module)
        self.calls.setdefault(name, []).append([])
        stream = stream_of(args, kwargs)
        self.streams[name] = None if stream is None else taking_of(module).turned(stream)

    def leave(self, module: nn.Module, output: Any) -> None:
        self.stack.pop()
        name = self.names[module]
        if name in self.written:
            self.written[name] |= self._trail.gives((output, kept_by(module)))
            if self._trail.besides:
                self.own.setdefault(name, f"a softmax of its own: {self._trail.besides}")
        if len(self.stack) < self._depth:  # a module inside the attention gives what is used around it
            self._trail.clear()


def kept_by(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that a module keeps under names of its own, as some do with their last weights."""
    return {name: x for name, x in vars(module).items() if isinstance(x, Tensor)}


def _kernel_call(module: nn.Module, stream: Tensor | None, given: dict[str, Any]) -> Seen:
    query, key, value = given["query"], given["key"], given["value"]
    layout = Layout.of(query, heads_told(module), stream)
    q, k = layout.fold(query), layout.fold(key, keys=True)
    place = value.untyped_storage()._cdata + value.storage_offset()
    return Seen(q.shape[1], k.shape[1], q.shape[-1], value.shape[-1], len(q), q.shape[2], place)


def _function_call(given: dict[str, Any]) -> Seen:
    heads = given["num_heads"]
    width, rows = given["embed_dim_to_check"] // heads, given["query"].shape[0]
    return Seen(heads, heads, width, width, None, rows, id(given["value"]))


def taking_of(module: nn.Module) -> Taking:
    """How a module is handed its stream, as it tells itself."""
    return Taking(bool(getattr(module, "batch_first", True)))


def find(model: nn.Module, run: Callable[[], Any]) -> Found:
    """Run a model once, at rest and without gradients, and tell its attention layers; it is left as it was."""
    watch = _Watch(model)
    with _as_it_was(model), _hooked(model, watch), torch.no_grad(), watch:
        run()
    found = Found(written=watch.written, ran=watch.ran)
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
    found.own |= watch.own | _scripted(model) | _other_kernel(model, found.layers)
    for name in found.own:
        found.layers.pop(name, None)
    found.layers = {name: replace(layer, number=i) for i, (name, layer) in enumerate(found.layers.items())}
    return found


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


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """At rest, and with what its modules keep and the random numbers that were there before."""
    kept = Kept(model)
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), resting(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the forward that follows says it again
        yield
    kept.put_back()
