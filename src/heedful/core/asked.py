"""Whether what is given is of the kind and in the range that the annotations of functions and fields ask for."""

from __future__ import annotations

import inspect
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache, wraps
from numbers import Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from torch import Tensor

from heedful.core.errors import Code, FieldError, UnknownFieldError
from heedful.core.ranges import bare, outside, rule_of, told, within

P = ParamSpec("P")
R = TypeVar("R")

# good values, by the name of what is asked for or else by its kind
_BY_NAME: dict[str, Any] = {
    "roles": {"marked": ((0, 4),)}, "heads": [(3, 1)], "receivers": [(3, 1)], "layers": [0], "only": "model",
    "batches": [{"input_ids": "ids"}], "tasks": ["needle"], "methods": ["SnapKV(0.25)"], "parts": ("TempScale(0.9)",),
    "tokenizer": Code("AutoTokenizer.from_pretrained(name)"), "path": "found", "statistics": {},
    "measures": ["SinkRate"], "folder": "kept", "name_or_path": "default", "mechanisms": ["MALA()"],
}  # fmt: skip
_BY_KIND: dict[str, Any] = {
    "Module": Code("models.default().model"), "Loaded": Code("models.default()"), "Method": Code("TempScale(0.9)"),
    "CatalogueEntry": Code("TempScale(0.9)"), "Tensor": Code("torch.tensor([[1, 2, 3]])"), "Path": "folder",
    "Prompt": Code("Prompt((1, 2, 3))"), "Callable": Code("a function"), "Profile": Code("another profile"), "int": 1,
    "a number": 0.5, "str": "text", "bool": True, "tuple": (1, 2), "Sequence": [1, 2], "Iterable": [1, 2],
    "Site": Code("Site.HEAD_OUTPUT"),
}  # fmt: skip

_SAID = {  # kinds that a user need not know by name
    "Module": "a model (torch.nn.Module)",
    "Loaded": "what heedful.models.load() gives",
    "tuple[Any, Any]": "a pair (model, tokenizer)",
    "Iterable[tuple[int, int]]": "pairs of layer and head",
    "CatalogueEntry": "a method (without .on() or .when())",
    "Iterable[Mapping[str, Any]]": "a list of batches, each a dict of the model's inputs",
}


def asks(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse arguments that are of no kind that the function's annotations name; `**more` is looked at by none."""
    inner = inspect.unwrap(function)
    signature = inspect.signature(inner)
    method = next(iter(signature.parameters), "") in ("self", "cls")
    owner = inner.__qualname__.removesuffix(".__init__") if method else f"{inner.__name__}()"

    @wraps(function)
    def asking(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            if not any(x.kind is x.VAR_KEYWORD for x in signature.parameters.values()):
                _require_known(owner, [*signature.parameters][method:], kwargs)
            return function(*args, **kwargs)  # Python says how it is called
        hints = _hints_of(inner)
        for name, hint in hints.items():
            if name in given:
                default = signature.parameters[name].default
                _require(owner, name, given[name], hint, default, _places(given[name], name, hints, given))
                _require_range(owner, name, given[name], hint, default)
        return function(*args, **kwargs)

    return asking


def known_fields(own: Callable[..., None], owner: str) -> Callable[..., None]:
    """A dataclass's own `__init__`, once each field is known to be one of the class."""
    known = [*inspect.signature(own).parameters][1:]

    @wraps(own)
    def begun(self: Any, *args: Any, **fields: Any) -> None:
        _require_known(owner, known, fields)
        own(self, *args, **fields)

    return begun


def _require_known(owner: str, known: list[str], given: Mapping[str, Any]) -> None:
    for name in given:
        if name not in known:
            raise UnknownFieldError(owner, name, given[name], known)


def require_passed(owner: str, how: Mapping[str, Any], verb: Callable[..., Any], attach: Callable[..., Any]) -> None:
    """Refuse what a verb was given by name that is neither its own nor an option of `attach`, to which it goes on."""
    own, theirs = (inspect.signature(one).parameters.values() for one in (verb, attach))
    known = [x.name for x in own if x.kind is not x.VAR_KEYWORD] + [x.name for x in theirs][2:]
    _require_known(owner, known, how)


def require_fields(value: Any) -> None:
    """Refuse a value whose fields are of no kind, or outside the range, that their annotations name.

    The others become what these mean: a list a tuple, and a whole number a float where that is asked for, since values
    that are equal look alike. None holds infinity, which files cannot.
    """
    kind: Any = type(value)
    hints = _hints_in(kind)
    for field in fields(value):
        name, given = field.name, getattr(value, field.name)
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        hint = hints.get(name, Any)
        taken = _as_meant(given, hint)
        if not _fits(taken, hint):
            _require(kind.__name__, name, given, hint, default)
        _require_range(value, name, taken, hint, default)
        if _endless(taken):
            rule = f"{rule_of(hint)} and finite" if getattr(hint, "__origin__", None) is float else "must be finite"
            raise FieldError(value, name, given, rule, default if isinstance(default, float) else 0.5)
        if taken is not given:
            object.__setattr__(value, name, taken)


def after_kinds(own: Callable[[Any], None]) -> Callable[[Any], None]:
    """A class's own check of its fields, once each is known to be of its kind and in its range."""

    @wraps(own)
    def checked(self: Any) -> None:
        require_fields(self)
        own(self)

    return checked


def _places(x: Any, name: str, hints: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """Other arguments that are of no kind for their place, and whose place would take this one: two were exchanged."""
    return (o for o in given if o != name and o in hints and not _fits(given[o], hints[o]) and _fits(x, hints[o]))


def _require(owner: str, name: str, given: Any, hint: Any, default: Any, places: Iterable[str] = ()) -> None:
    if _fits(given, hint):
        return
    kinds = list(dict.fromkeys(_words(hint)))
    said = [_SAID.get(kind, kind) for kind in kinds]
    told = ", ".join(said[:-1]) + (" or " if said[:-1] else "") + said[-1]
    good = next((_BY_KIND[x] for kind in kinds if (x := kind.partition("[")[0]) in _BY_KIND), None)
    good = good if hint is int else _BY_NAME.get(name, good)  # a number of heads is no list of them
    if default is not inspect.Parameter.empty and default is not None and _fits(default, hint):
        good = default
    elsewhere = "".join(f" (this suits {place}=)" for place in places)
    ours = any(kind.__module__.startswith("heedful.") for kind in (get_args(hint) or (hint,)) if isinstance(kind, type))
    if ours and isinstance(place := getattr(given, "handed_to", None), str):  # of the catalogue, and of another kind
        whole = isinstance(given, type)
        elsewhere += f", and this is a class: {given.__name__}()" if whole else f", and this goes to {place}"
    if held := [each for each, x in getattr(given, "__dict__", {}).items() if each[:1] != "_" and _fits(x, hint)]:
        elsewhere += f", such as its {', '.join(held[:4])}"  # of a pipeline, say, the models
    raise FieldError(owner, name, given, f"must be {told}{elsewhere}", good)


def _require_range(owner: object, name: str, given: Any, hint: Any, default: Any) -> None:
    if rule := outside(given, hint):
        usual = isinstance(default, float | int | str) and not outside(default, hint)
        raise FieldError(owner, name, given, rule, default if usual else within(hint))


def takes(kind: type) -> dict[str, str]:
    """What each field of a class takes, in words."""
    return {name: _taken(hint) for name, hint in _hints_in(kind).items()}


def _taken(hint: Any) -> str:
    ranges = [x for x in (hint, *get_args(hint)) if get_origin(x) is Annotated]
    kinds = " or ".join(kind for kind in dict.fromkeys(_words(hint)) if kind != "None")
    whole = [kinds] if not all(map(told, ranges)) or not ranges else []  # some rules say all
    rules = dict.fromkeys(re.sub("^must (be |lie |hold |(?=name))", "", rule_of(x)) for x in ranges)
    return ", ".join([*whole, *rules, *["or None"] * (type(None) in get_args(hint))])


def _fits(x: Any, hint: Any) -> bool:
    if isinstance(hint, TypeVar):
        hint = hint.__bound__ or Any
    if get_origin(hint) is Annotated:
        return _fits(x, hint.__origin__)
    origin, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is NoneType:
        return x is None
    if origin in (Union, UnionType):
        return any(_fits(x, kind) for kind in inside)
    if origin is Literal:
        return any(type(x) is type(one) and x == one for one in inside)
    if origin is type:
        return isinstance(x, type)
    if hint is int:
        return whole_number(x) is not None
    if hint is float:
        return isinstance(x, Real) and not isinstance(x, bool) and not math.isnan(_float(x))
    if origin is tuple and isinstance(x, tuple) and inside:
        if inside[-1] is not ...:
            return len(inside) == len(x) and all(map(_fits, x, inside))
        return all((type(one) is int and inside[0] is int) or _fits(one, inside[0]) for one in x)
    kind = origin or hint
    if kind.__module__ == "collections.abc" and isinstance(x, str | bytes):
        return False  # a text is no list of its letters
    if origin in (Iterable, Sequence) and isinstance(x, Mapping):
        return False  # one batch is no list of its names
    if isinstance(x, list | tuple | set | frozenset) and origin in (Iterable, Sequence):
        return get_origin(inside[0]) is tuple or all(_fits(one, inside[0]) for one in x)  # heads: pairs of any kind
    if origin is Iterable and inside[0] is not Any and _fits(x, inside[0]):
        return False  # one stack is no list of its parts
    if isinstance(x, dict) and origin is Mapping:
        return all(_fits(key, inside[0]) and _fits(one, inside[1]) for key, one in x.items())
    if getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False):
        return True
    return isinstance(x, kind)


def whole_number(x: Any) -> int | None:
    """What counts as a whole number, such as numpy's, as Python's own; None for all else, and for truth values."""
    if isinstance(x, bool | Tensor):
        return None
    try:
        return operator.index(x)
    except TypeError:
        return None


def _float(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:  # a whole number above all
        return math.inf if x > 0 else -math.inf


def _endless(x: Any) -> bool:
    return any(map(_endless, x)) if isinstance(x, tuple) else isinstance(x, float) and math.isinf(x)


def _as_meant(x: Any, hint: Any) -> Any:
    """Plain numbers of the annotation's kind, and tuples for lists and ranges, so that a value is frozen and hashes."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _as_meant(x, hint.__origin__)
    if origin in (Union, UnionType):
        return x if type(x) in inside else next((y for kind in inside if _fits(y := _as_meant(x, kind), kind)), x)
    if hint in (int, float) and type(x) is not hint and _fits(x, hint):
        return whole_number(x) if hint is int else _float(x)
    if origin is tuple and inside and isinstance(x, list | range | tuple):
        if type(x) is tuple and all(type(one) is int for one in x) and inside == (int, ...):
            return x  # a span's places, of which there may be many
        kinds = inside[:1] * len(x) if inside[-1] is ... else inside
        return tuple(map(_as_meant, x, kinds)) if len(kinds) == len(x) else x
    return x


def _words(hint: Any) -> Iterator[str]:
    hint = bare(hint.__bound__ if isinstance(hint, TypeVar) else hint)
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        yield from (word for kind in sorted(inside, key=lambda kind: kind is NoneType) for word in _words(kind))
    elif hint is None or hint is NoneType:
        yield "None"
    elif origin is Literal:
        yield from map(repr, inside)
    elif hint is float:
        yield "a number"
    elif origin is Callable:
        yield "Callable"
    else:
        yield re.sub(r"\w+\.(?=\w)", "", str(hint)) if inside else hint.__name__


@cache
def _hints_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = {
        name: x.annotation
        for name, x in inspect.signature(function).parameters.items()
        if x.kind not in kinds and x.annotation is not inspect.Parameter.empty
    }
    return _resolved(found, function.__globals__, {})


@cache
def _hints_in(kind: Any) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        home = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        found |= _resolved(inspect.get_annotations(base), home, dict(vars(base)))
    return found


def _resolved(hints: Mapping[str, Any], names: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Annotations as types; those that name what is not there at run time are left out, since nobody can ask for it."""
    found = {}
    for name, hint in hints.items():
        try:
            found[name] = eval(hint, names, more) if isinstance(hint, str) else hint
        except NameError:
            continue
    return found
