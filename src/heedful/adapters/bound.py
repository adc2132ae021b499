"""The attention function under heedful's name, and the attention modules whose calls it hands to their run."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from heedful.adapters.kvcache import HeldLayer
from heedful.adapters.layers import own_source
from heedful.adapters.lazymask import LISTS, LazyMask, chosen_pairs, lazy_additive_mask, lazy_mask
from heedful.adapters.taking import Taking
from heedful.core.call import Call
from heedful.core.errors import FieldError, NotEntered, RefusedModel
from heedful.core.positions import Positions
from heedful.engine.merging import Merges
from heedful.engine.plan import NO_STEPS, Plan

if TYPE_CHECKING:
    from heedful.adapters.spread import Spread

LAZY, ADDITIVE = "heedful", "heedful_additive"  # the second for models whose own attention adds its mask
BLANK = Call(0, 0, "", 0, 0, Positions.row(0, 0), Positions.row(0, 0), 1.0)
OWN = ("eager", "sdpa")  # kernels for which models do themselves what they leave to others

Outcome = tuple[Tensor, Tensor | None]  # [b q h d], and the pattern [b h q k] where there is one


@dataclass(frozen=True, eq=False)
class Request:
    """What an attention module hands to its attention function."""

    q: Tensor  # [b h q d]
    k: Tensor  # [b g k d]
    v: Tensor  # [b g k d]
    mask: Tensor | None
    scaling: float | None = None
    dropout: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)


class Server(Protocol):
    """What answers the calls of a bound module."""

    @property
    def under_way(self) -> bool:
        """Whether a forward of its model is under way in this thread."""

    def is_layer(self, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a bound module that is called is an attention layer, which may show then alone."""

    def attention(self, bound: Bound, request: Request) -> Outcome: ...


class StandIn(str):
    """One of heedful's names, as it stands in a config in place of another; copies and files have that one back."""

    native: str | None
    users: WeakSet[Server]  # of the models that share the config, those that are attached

    def __new__(cls, name: str, native: str | None) -> StandIn:
        new = super().__new__(cls, name)
        new.native, new.users = native, WeakSet()
        return new

    def __reduce__(self) -> Any:
        return type(self.native), () if self.native is None else (self.native,)


def native_name(name: str | None) -> str:
    """The attention implementation that a model had, or has, without a run."""
    return (name.native if isinstance(name, StandIn) else name) or "eager"


@dataclass(eq=False)
class Bound:
    """One attention module of an attached model."""

    server: Server
    module: nn.Module
    name: str
    number: int | None  # None: it runs through the interface, but outside the part that is served
    native: str  # the implementation that the model had before
    lowest: int = 0  # the number of the first layer of the list that it stands in
    highest: int = 0  # the number of the last layer of that list
    outside: bool = False  # it does not go through transformers' interface
    alone: bool = False  # it stands in no list of layers: what calls it may hand its weights on unasked
    hidden: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin of this call's tokens
    cache: Cache | None = None  # of this call; of an encoder and decoder's two that of self attention
    held: HeldLayer | None = None  # its layer in there, if that may hold fewer entries than it has seen
    other: Tensor | None = None  # the sequence that it was handed beside its own
    joint: tuple[int, int] | None = None  # lengths of both sequences, in the order in which it attends to both at once
    merges: Merges | None = None  # what has become of its tokens in the layers before it
    cross: bool = False
    called: bool = False
    spared: frozenset[str] = frozenset()  # what nobody reads of this call's projections: q, k, v, o
    call: Call | None = None
    outline: Call = BLANK  # what is the same in each of its calls
    steps: Plan = NO_STEPS  # those of all phases
    taking: Taking = field(default_factory=Taking)
    spread: Spread | None = None
    written: bool | None = None  # whether it gives its weights; None: it does not write attention out
    heads_at: int | None = None  # which leading axis of its queries holds its heads, where that is known
    output: nn.Module | None = None  # what gives OUTPUT, where that is known better than from its name

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def sizes(self) -> Tensor | None:
        """How many tokens each of its own is made of; None where none were merged, or keys are another sequence's."""
        return None if self.merges is None or self.cross else self.merges.sizes


# the modules of attached models, each with its Bound or what serves it otherwise; weak on both sides, since these lead
# to their keys, and the modules' own hooks hold them
_attached: WeakKeyDictionary[nn.Module, ReferenceType[Any]] = WeakKeyDictionary()


def bound_to(module: nn.Module) -> Bound | None:
    """What the run that is attached to a module through transformers' interface knows of it."""
    place = _attached.get(module)
    found = None if place is None else place()
    return found if isinstance(found, Bound) else None


def server_of(module: nn.Module) -> Any:
    """The adapter of the run that is attached to a module, if one is."""
    place = _attached.get(module)
    found = None if place is None else place()
    return found.server if isinstance(found, Bound) else found


def require_free(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuse a model with modules to which a run is attached."""
    if any(server_of(module) is not None for module in modules):
        raise FieldError(
            "attach()", "model", type(model).__name__,
            "a run is attached already; close it, as with heedful.attached(model).close(), or join the methods into "
            "one stack", "attach(model, a | b)",
        )  # fmt: skip


def take(modules: Iterable[nn.Module], by: Any) -> None:
    """Note who serves modules from now on: a Bound of its own, or an adapter for all."""
    _attached.update(dict.fromkeys(modules, ref(by)))


def let_go(modules: Iterable[nn.Module], server: Any) -> None:
    """Forget those that the adapter serves."""
    for module in modules:
        if server_of(module) is server:
            del _attached[module]


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
) -> Outcome:
    """The attention function under heedful's name: hands the call to whichever run is attached to the module."""
    bound, request = bound_to(module), Request(query, key, value, attention_mask, scaling, dropout, more)
    if bound is not None:
        return bound.server.attention(bound, request)
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if not isinstance(name, StandIn) or any(user.under_way for user in name.users):
        raise NotEntered(
            f"{type(module).__name__} asks for heedful's attention, but no run is attached to it; was it put into the "
            "model since? Attach again"
        )
    return native(module, native_name(name), request)  # of another model, which shares its config with an attached one


AttentionInterface.register(LAZY, _function)
AttentionInterface.register(ADDITIVE, _function)
AttentionMaskInterface.register(LAZY, lazy_mask)
AttentionMaskInterface.register(ADDITIVE, lazy_additive_mask)


def native(module: nn.Module, implementation: str, request: Request) -> Outcome:
    """What the model would have done, bit for bit."""
    kind: Any = type(module)
    registry, eager = _interface(kind)
    function: Callable[..., Outcome] = registry.get_interface(implementation, eager)
    mask, more = _native_mask(module, implementation, request), request.more
    if mask is None and isinstance(request.mask, LazyMask) and "is_causal" in more and request.q.shape[2] > 1:
        # some modules set the flag where they see no mask, and with us they have always seen one
        more = {**more, "is_causal": request.mask.spec.mask.causal}
    config: Any = None if implementation in OWN else getattr(module, "config", None)
    name = None if config is None else config._attn_implementation_internal
    if config is not None:  # all but those two may ask it for their own name
        config._attn_implementation_internal = implementation
    try:
        return function(
            module, request.q, request.k, request.v, mask, scaling=request.scaling, dropout=request.dropout, **more
        )
    finally:
        if config is not None:
            config._attn_implementation_internal = name


# a module names its eager function where it looks its attention up; a few have several in one file
_LOOK_UP = re.compile(r"get_interface\(\s*[^,()]+,\s*(\w+)\s*,?\s*\)")


@cache
def _interface(kind: Any) -> tuple[Any, Any]:
    """The registry that a class looks its attention function up in, and its eager function."""
    for base in kind.__mro__:
        found = _LOOK_UP.search(own_source(base))
        home = sys.modules.get(base.__module__)
        if found and home is not None:
            return getattr(home, "ALL_ATTENTION_FUNCTIONS"), getattr(home, found[1])  # noqa: B009 - mypy knows no module
    raise RefusedModel(f"heedful finds no eager attention function beside {kind.__name__}")


def passes_through(kind: Any, argument: str) -> bool:
    """Whether an argument came along unasked: the class does not write it, and its own eager function ignores it."""
    written = re.compile(rf"\b{re.escape(argument)}\s*=")
    return argument not in inspect.signature(_interface(kind)[1]).parameters and not any(
        written.search(own_source(base)) for base in kind.__mro__
    )


def _native_mask(module: nn.Module, implementation: str, request: Request) -> Tensor | None:
    mask, q, k = request.mask, request.q, request.k
    chosen = implementation in OWN and not LISTS.isdisjoint(request.more)
    picked = chosen_pairs(module, request.more, q.shape[1], k.shape[2]) if chosen else None
    if picked is None:
        return mask.spec.native(implementation) if isinstance(mask, LazyMask) else mask
    # models lay their choice of keys into the mask for these two names only, and hand it over apart for all others
    if isinstance(mask, LazyMask):
        mask = mask.spec.table
    kept = picked if mask is None else picked & (mask if mask.dtype == torch.bool else mask == 0)
    if implementation == "sdpa":
        return kept
    return torch.zeros(kept.shape, dtype=q.dtype, device=q.device).masked_fill(~kept, torch.finfo(q.dtype).min)
