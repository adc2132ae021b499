"""Methods as values that JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from heedful.core.entry import CatalogueEntry
from heedful.core.errors import DefinitionError, FieldError, HeedfulError
from heedful.core.fitted import Fitted
from heedful.core.method import Scoped, method_of

SHIPPED = "heedful.methods."
SCOPE = ("layers", "heads", "phase", "steps")


def name_of(kind: type[CatalogueEntry]) -> str:
    """The class's own name where the catalogue has it, with its module elsewhere."""
    listed = kind.__module__.startswith(SHIPPED) and not kind.__name__.startswith("_")
    return kind.__name__ if listed else f"{kind.__module__}.{kind.__qualname__}"


def spelled(part: CatalogueEntry | Scoped) -> dict[str, Any]:
    """A method and its restrictions as plain values; tensors are named by what they hold."""
    method = method_of(part)
    names = [f.name for f in fields(method) if f.init]
    out: dict[str, Any] = {
        "method": name_of(type(method)),
        "fields": {name: _plain(method, name, getattr(method, name)) for name in names},
    }
    if isinstance(part, Scoped):
        given = part.layers, part.heads, part.phase and part.phase.value, part.steps
        out |= {name: list(x) if isinstance(x, tuple) else x for name, x in zip(SCOPE, given, strict=True)}
    return out


def _plain(owner: CatalogueEntry, field: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, tuple | list):
        return [_plain(owner, field, x) for x in value]
    if isinstance(value, Fitted):
        return {"fitted": value.digest}
    if isinstance(value, CatalogueEntry | Scoped):
        return spelled(value)
    rule = "cannot be written down: files hold finite numbers, text, tuples, methods and Fitted tensors"
    raise FieldError(repr(owner), field, value, rule, "a value of these, in a class of your own if it is a function")


def fitted_in(value: Any) -> Iterator[Fitted]:
    """The tensors that a method, or anything in its fields, holds."""
    if isinstance(value, Fitted):
        yield value
    elif isinstance(value, tuple | list):
        for x in value:
            yield from fitted_in(x)
    elif isinstance(value, CatalogueEntry | Scoped):
        method = method_of(value)
        for f in fields(method):
            yield from fitted_in(getattr(method, f.name))


def built(
    spelling: Any, find: Callable[[str], type[CatalogueEntry]], tensors: Mapping[str, Fitted]
) -> CatalogueEntry | Scoped:
    """What `spelled` described; `find` gives the class of a name, `tensors` what was named by its digest."""
    if not isinstance(spelling, dict) or not isinstance(spelling.get("fields"), dict):
        raise DefinitionError(f"{spelling!r} describes no method: it must have a 'method' and its 'fields'")
    if odd := spelling.keys() - {"method", "fields", *SCOPE}:
        raise DefinitionError(f"{min(odd)!r} is nothing that a method is described by")
    kind = find(str(spelling.get("method")))
    try:
        method = kind(**{word: _value(value, find, tensors) for word, value in spelling["fields"].items()})
        if not spelling.keys() & set(SCOPE):
            return method
        layers, heads, phase, steps = (_value(spelling.get(name), find, tensors) for name in SCOPE)
        scoped = Scoped(method).on(layers, heads)  # type: ignore[arg-type]  # refused by it if it is none
        return scoped if phase is None and steps is None else scoped.when(phase, steps=steps)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        if isinstance(error, HeedfulError):
            raise
        raise DefinitionError(f"{spelling!r} describes no {kind.__name__}: {error}") from error


def _value(value: Any, find: Callable[[str], type[CatalogueEntry]], tensors: Mapping[str, Fitted]) -> Any:
    if isinstance(value, list):
        return tuple(_value(x, find, tensors) for x in value)
    if not isinstance(value, dict):
        return value
    if set(value) != {"fitted"}:
        return built(value, find, tensors)
    if value["fitted"] not in tensors:
        raise DefinitionError(f"the tensors {str(value['fitted'])[:8]} are not there")
    return tensors[value["fitted"]]
