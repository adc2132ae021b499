"""Which modules of a model are attention layers, which go through transformers' interface, and how they are named."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from heedful.adapters.suspects import calls_kernel, has_softmax, may_attend
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.figures import a_few


@cache
def own_source(kind: type) -> str:
    """The text of one class without its bases, empty where there is none."""
    if kind.__module__.startswith(("torch.", "builtins", "transformers.modeling_", "transformers.utils")):
        return ""  # a model's base class speaks of the interface without being an attention layer
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


@cache
def source_of(kind: type) -> str:
    """A class's own source and that of its bases, as far as there is any."""
    return "\n".join(own_source(base) for base in kind.__mro__)


def uses_interface(kind: Any) -> bool:
    """Whether the class looks up its attention function by the name in its config."""
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source_of(kind)


def own_attention(kind: Any) -> bool:
    """Whether the class computes an attention map by itself."""
    if issubclass(kind, nn.MultiheadAttention):
        return True
    if not any(word in kind.__name__.lower() for word in ("attention", "attn")):
        return calls_kernel(kind)
    source = source_of(kind)
    marks = ("softmax(", "Softmax(", "scaled_dot_product_attention(", "multi_head_attention_forward(")
    return any(m in source for m in marks) or calls_kernel(kind) or has_softmax(kind)


def interface_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules that go through the interface, by dotted name, each module once."""
    return {name: m for name, m in model.named_modules() if uses_interface(type(m))}


def lowest(names: Sequence[str]) -> tuple[int, ...]:
    """For each of the layers the number of the first in its list."""
    lists = [list_of(name) for name in names]
    return tuple(lists.index(mine) for mine in lists)


def highest(names: Sequence[str]) -> tuple[int, ...]:
    """For each of the layers the number of the last in its list."""
    last = {list_of(name): number for number, name in enumerate(names)}
    return tuple(last[list_of(name)] for name in names)


@cache
def list_of(name: str) -> str:
    """The list of layers that one stands in: those whose names are alike up to a number."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", name, maxsplit=1)[0]


def block_of(model: nn.Module, name: str) -> str | None:
    """The layer of the model that an attention module stands in: the nearest item of a list of alike items.

    A sequence of modules is such a list where it has several alike items. T5 keeps the parts of one layer in a list of
    their own, whose items are not alike.
    """
    parts = name.split(".")
    items = [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]

    def around(item: str) -> nn.Module:
        return model.get_submodule(item.rpartition(".")[0])

    def alike(item: str) -> bool:
        return len({type(x) for x in around(item).children()}) == 1

    def listed(item: str) -> bool:
        chain = around(item)
        return isinstance(chain, nn.ModuleList) or (isinstance(chain, nn.Sequential) and len(chain) > 1 and alike(item))

    items = list(filter(listed, items))
    return next(filter(alike, items), items[0] if items else None)


def leftovers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules that compute their map by themselves, out of anybody's reach."""
    return {
        name: m
        for name, m in model.named_modules()
        if not uses_interface(type(m))
        and own_attention(type(m))
        and not any(uses_interface(type(c)) for c in m.modules())
    }


def suspects(model: nn.Module, known: Collection[str]) -> dict[str, nn.Module]:
    """Modules that stand apart from known layers and may compute attention, though their class does not say so."""
    return {name: m for name, m in model.named_modules() if name and may_attend(type(m)) and apart(name, known)}


def apart(name: str, known: Iterable[str]) -> bool:
    """Whether a module neither lies in one of these nor around one."""
    return not any(within(a, (b,)) for x in known for a, b in ((x, name), (name, x)))


def within(name: str, only: Iterable[str] | None) -> bool:
    """Whether a dotted name lies under one of the prefixes."""
    return only is None or any(name == p or name.startswith(p + ".") for p in only)


def parts_of(only: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """The dotted names of the parts to serve, one or several; None for the whole model."""
    several = isinstance(only, Iterable) and not isinstance(only, str)
    chosen: Any = None if only is None else tuple(only) if several else (only,)
    for name in chosen or ():
        if not isinstance(name, str):
            raise FieldError("attach()", "only", only, "must be dotted names of parts of the model", "model.layers")
    return chosen


def served(
    kind: str, known: Iterable[str], left: Mapping[str, str], only: tuple[str, ...] | None, none: str
) -> tuple[str, ...]:
    """The layers of a model that a run serves, of those that are known; `left` are out of reach, with what to say."""
    known = tuple(known)
    names = tuple(name for name in known if within(name, only))
    outside = [name for name in left if within(name, only)]
    for prefix in only or ():
        if not any(within(name, (prefix,)) for name in known):
            roots = sorted({".".join(name.split(".")[:2]) for name in known})
            raise FieldError("attach()", "only", prefix, f"no served layer of {kind} lies there", roots[:1] or None)
    said = [left[name] for name in outside]
    if not names:
        raise RefusedModel(f"{kind} {none}" + (f"; its own are {a_few(said)}" if outside else ""))
    if outside:
        raise unreached(kind, names, outside, said)
    return names


def unreached(kind: str, names: Iterable[str], left: list[str], said: list[str], unseen: int = 0) -> RefusedModel:
    """What is said of a model with layers out of reach, the last of which have not run yet."""
    also = f", and {unseen} that did not run yet (`inputs` would show which can be served)" if unseen else ""
    rest = _roots(names, left)
    hint = f". To work on the rest and leave these alone{also}, name it: attach(..., only={rest!r})" if rest else ""
    return RefusedModel(f"{kind} computes some attention by itself, which heedful cannot reach: {a_few(said)}{hint}")


def _roots(served: Iterable[str], left: list[str]) -> list[str]:
    """The shortest prefixes that hold served layers and none of the others."""
    out: list[str] = []
    for name in served:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            prefix = ".".join(parts[:i])
            if not any(within(x, (prefix,)) for x in left):
                if prefix not in out:
                    out.append(prefix)
                break
    return out
