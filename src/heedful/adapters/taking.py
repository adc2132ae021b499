"""How a module is handed its stream, and the other sequence that it may attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

STREAMS = ("hidden_states", "x", "query", "src", "tgt", "input")  # names that modules give to their stream
OTHERS = (
    "key_value_states", "encoder_hidden_states", "cross_attention_states", "context", "memory", "key", "kv", "cond",
)  # fmt: skip

Args = tuple[Any, ...]


def stream_of(args: Args, kwargs: dict[str, Any]) -> Tensor | None:
    """A module's own sequence, as it is handed over."""
    found = args[0] if args else None
    if not args or "hidden_states" in kwargs:
        for name in STREAMS:
            if name in kwargs:
                found = kwargs[name]
                break
    return found if isinstance(found, Tensor) else None


def other_of(told: Mapping[str, Any], stream: Tensor | None) -> Tensor | None:
    """The sequence that a module attends to beside its own, or in its place, among its arguments by name."""
    for name in OTHERS:
        x = told.get(name)
        if isinstance(x, Tensor) and x is not stream:
            return x
    return None


def tokens_of(told: Mapping[str, Any]) -> Tensor | None:
    """The token ids `[b n]` that a model is given, among its arguments by name."""
    found = told.get("input_ids")
    fits = isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point()
    return found if fits else None


def put(new: Tensor, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
    """The arguments with another stream, wherever that was handed over."""
    old = stream_of(args, kwargs)
    return tuple(new if x is old else x for x in args), {name: new if x is old else x for name, x in kwargs.items()}


@dataclass(frozen=True)
class Taking:
    """In which order a module takes rows and tokens."""

    batch_first: bool = True  # else [n b e]
    channels_first: bool = False  # [b e n], as convolutions have it

    def turned(self, x: Tensor) -> Tensor:
        """`[b n e]` from the module's own layout, and back."""
        if self.channels_first and x.ndim == 3:
            return x.transpose(1, 2)
        return x if self.batch_first or x.ndim != 3 else x.transpose(0, 1)
