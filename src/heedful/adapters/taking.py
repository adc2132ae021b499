"""How a module is handed its stream, and the other sequence that it may attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

STREAMS = ("hidden_states", "x", "query", "src", "tgt", "input")  # names that modules give to their stream
OTHERS = (
    "key_value_states", "encoder_hidden_states", "cross_attention_states", "context", "memory", "key", "kv", "cond",
)  # fmt: skip


@dataclass(frozen=True)
class Taking:
    """What is known of a module's arguments; nothing but the common names, where no more is told."""

    names: tuple[str, ...] = ()  # of its positional arguments
    batch_first: bool = True  # else [n b e]

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The module's own sequence, as it is handed over."""
        if "hidden_states" not in kwargs and args:
            found = args[0]
        else:
            found = next((kwargs[name] for name in STREAMS if name in kwargs), None)
        return found if isinstance(found, Tensor) else None

    def other(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The sequence that it attends to beside its own, or in its place."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        stream = self.stream(args, kwargs)
        found = (given[name] for name in OTHERS if isinstance(given.get(name), Tensor))
        return next((x for x in found if x is not stream), None)

    def put(self, new: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another stream, wherever that was handed over."""
        old = self.stream(args, kwargs)
        given = tuple(new if x is old else x for x in args)
        return given, {name: new if x is old else x for name, x in kwargs.items()}

    def turned(self, x: Tensor) -> Tensor:
        """`[b n e]` from the module's own layout, and back."""
        return x if self.batch_first or x.ndim != 3 else x.transpose(0, 1)
