"""What a module need not do where a method replaces it: rotate its queries and keys, project what nobody reads."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.bound import Bound
from heedful.adapters.carried import shelf_of
from heedful.adapters.kvcache import seen
from heedful.adapters.layers import source_of
from heedful.adapters.rotation import ROTARY, rotates
from heedful.core.errors import RefusedModel

UNROTATED = "keys from before the rotary embedding"
ROTATED = (
    "the cache holds keys with the rotary embedding in them, and a method asks for keys from before it; read the text "
    "anew, with a method that is idle in none of its calls"
)
NOTHING = "no keys and values, since its block was replaced"
Args = tuple[Any, ...]


def shares_keys(module: nn.Module) -> bool:
    """Whether other layers may attend to the keys of this one."""
    source = _source(module)
    return "kv_shared" in source or "shared_kv" in source


def unrotated(bound: Bound, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]] | None:
    """The arguments of a module with a rotary embedding that rotates by nothing; None where there is none at all."""
    kind: Any = type(bound.module)
    names = list(inspect.signature(kind.forward).parameters)[1:]
    place = names.index(ROTARY) if ROTARY in names and ROTARY not in kwargs else len(args)
    given = kwargs.get(ROTARY) if place >= len(args) else args[place]
    if shares_keys(bound.module):
        raise RefusedModel(f"{_named(bound)} attends to keys that it shares with other layers, which rotate them")
    still = _still(given, _source(bound.module))
    if still is None:
        # a module that can be handed a rotary embedding, and is not, has none in this call
        if (given is None and ROTARY in names) or not rotates(kind):
            return None
        raise RefusedModel(
            f"{_named(bound)} rotates queries and keys by itself, so what they are before is out of reach; restrict "
            "the method to other layers with .on(layers=[...])"
        )
    if place >= len(args):
        return args, {**kwargs, ROTARY: still}
    return (*args[:place], still, *args[place + 1 :]), kwargs


def _source(module: nn.Module) -> str:
    kind: Any = type(module)
    return source_of(kind)


def takes_up(bound: Bound, what: str) -> bool:
    """Whether the cache of this call, if there is one, can hold `what` in place of the model's keys and values."""
    if bound.cache is None:
        return True
    number = getattr(bound.module, "layer_idx", None)
    if number is None or bound.cross:  # the keys of another sequence are projected once, for all calls to read
        return False
    return shelf_of(bound.cache).takes(number, what, seen(bound.cache, number))


def _named(bound: Bound) -> str:
    return f"a method that asks for queries and keys before the rotary embedding cannot act in {bound.name}: it"


def _still(rotary: Any, source: str) -> Any:
    """Angles of nothing in the form of those that are given: complex numbers, or cosines and sines in either order."""
    if isinstance(rotary, Tensor) and rotary.is_complex():
        return torch.ones_like(rotary)
    if isinstance(rotary, tuple) and len(rotary) == 2 and all(isinstance(x, Tensor) for x in rotary):
        if f"cos, sin = {ROTARY}" in source:
            return torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])
        if f"sin, cos = {ROTARY}" in source:
            return torch.zeros_like(rotary[0]), torch.ones_like(rotary[1])
    return None


class Spared:
    """A projection of a bound module: it is handed no rows where nobody reads what it gives, which are zeros then."""

    def __init__(self, bound: Bound, letters: frozenset[str]) -> None:
        self.bound, self.letters = bound, letters  # of what it projects to: q, k, v, o
        self._rows: torch.Size | None = None

    def before(self, _: nn.Module, args: Args, kwargs: dict[str, Any]) -> Any:
        self._rows = None
        if not self.letters <= self.bound.spared or not args or not isinstance(args[0], Tensor):
            return None
        self._rows = args[0].shape[:-1]
        return (args[0].narrow(-2, 0, 0), *args[1:]), kwargs

    def after(self, _: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        rows, self._rows = self._rows, None
        return None if rows is None else output.new_zeros(*rows, output.shape[-1])
