"""What the door of torch's operations sees in a model, at its own size, without its weights.

Which modules are attention layers, and which are out of reach and why, is told by the operations that a forward calls
and by the sizes of what it calls them with. On torch's meta device both are the same as elsewhere, and a forward of
any size costs a fraction of a second.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from heedful.adapters.operations.finding import Found, find

from .audit import Witness

UNSEEN = ("meta", "unsupported scalartype")  # said where a tensor without memory is asked what is in it


@contextmanager
def unset() -> Iterator[None]:
    """Weights are not drawn in here: where they have no memory, drawing them is half of the cost of a model."""
    places: list[tuple[Any, str]] = [(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"]
    if (drawn := sys.modules.get("timm.layers.weight_init")) is not None:
        places.append((drawn, "_trunc_normal_"))
    kept = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, _ in kept:
        setattr(place, name, lambda tensor, *args, **how: tensor)
    try:
        yield
    finally:
        for place, name, function in kept:
            setattr(place, name, function)


def switches(module: nn.Module) -> tuple[str, ...]:
    """What is switched on in a module."""
    return tuple(sorted(key for key, x in vars(module).items() if x is True and key != "training" and key[0] != "_"))


def look(model: nn.Module, call: Callable[[], Any]) -> dict[str, Any]:
    """Its class, its kinds of attention modules with how many there are of each, and what is refused of it."""
    with Witness() as witness:
        found = find(model, call)
    kinds = collections.Counter(kind_of(model, found, name) for name in found.layers)
    own = {f"{type(model.get_submodule(name)).__name__}: {why}" for name, why in found.own.items()}
    told: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kinds": dict(sorted(kinds.items())),
        "own": sorted(own),
    }
    if not kinds and not own and witness.maps:
        told["softmax"] = sorted(witness.maps)  # of what is no product of queries and keys, as a weight of branches
    return told


def kind_of(model: nn.Module, found: Found, name: str) -> str:
    """What decides how an attention module is served: its class, its switches, and how it calls attention."""
    module, layer = model.get_submodule(name), found.layers[name]
    kind = type(module)
    how = [
        *switches(module),
        *(["written out"] if name in found.written else []),
        *(["gives weights"] if found.written.get(name) else []),
        *(["shared keys"] if layer.kv_heads != layer.heads else []),
        *(["channels first"] if name in found.channels_first else []),
    ]
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}" + (f" ({', '.join(how)})" if how else "")
