"""Numbers and words that a field may hold, as types: `keep: Share = 0.5` is all that a method says of it.

They are `typing.Annotated` types in the words of annotated-types, which hypothesis and pydantic read too. What several
methods ask for has a name here; whatever else a field may hold is spelled out, as in `Annotated[int, Ge(2)]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from annotated_types import BaseMetadata, DocInfo, Ge, GroupedMetadata, Gt, Interval, Le, Lt, MinLen, Predicate, doc

from heedful.core.errors import DefinitionError


def is_odd(n: int) -> bool:
    return n % 2 == 1


PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
OddInt = Annotated[int, Ge(1), Predicate(is_odd)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
ProperShare = Annotated[float, Interval(gt=0, lt=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
RoleName = Annotated[str, MinLen(1), doc("must name a role")]
Layers = Annotated[tuple[NonNegativeInt, ...], MinLen(1), doc("must name one or more layers, from 0 up")]

_KNOWN = (Ge, Gt, Le, Lt, MinLen, Predicate, DocInfo)
_ENDS = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}


def bare(hint: Any) -> Any:
    """A type without its ranges."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return bare(hint.__origin__)
    if origin in (Union, UnionType):
        return reduce(or_, map(bare, inside))
    if origin is tuple:
        return tuple.__class_getitem__(tuple(x if x is ... else bare(x) for x in inside))
    return hint


def outside(x: Any, hint: Any) -> str | None:
    """The rule that a value of the right kind breaks; None where it breaks none."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        broken = [outside(x, kind) for kind in inside if _is(x, kind)]
        more = ", or None" if type(None) in inside else ""
        return f"{broken[0]}{more}" if broken and all(broken) else None
    if origin is tuple and isinstance(x, tuple):
        kinds = inside[:1] * len(x) if inside[-1] is ... else inside
        rules = (outside(one, kind) for one, kind in zip(x, kinds, strict=False))  # of which kind a pair is, others ask
        return next((f"each {rule}" for rule in rules if rule), None)
    if origin is not Annotated:
        return None
    held = all(_holds(x, limit) for limit in limits_of(hint))
    inner = outside(x, hint.__origin__) if held else None
    return inner and (told(hint) or inner) if held else rule_of(hint)


def _is(x: Any, kind: Any) -> bool:
    kind = kind.__origin__ if get_origin(kind) is Annotated else kind
    kind = get_origin(kind) or kind
    return isinstance(kind, type) and isinstance(x, kind)


@cache
def limits_of(hint: Any) -> tuple[Any, ...]:
    """What an annotated type asks of a value, one thing at a time."""
    groups = (list(x) if isinstance(x, GroupedMetadata) else [x] for x in hint.__metadata__)
    found = tuple(x for group in groups for x in group)
    if unknown := [x for x in found if isinstance(x, BaseMetadata) and not isinstance(x, _KNOWN)]:
        raise DefinitionError(f"{unknown[0]!r} is no range that is asked for here; write Predicate(...) with doc(...)")
    return found


def _holds(x: Any, limit: Any) -> bool:
    match limit:
        case Ge(ge):
            return bool(x >= ge)
        case Gt(gt):
            return bool(x > gt)
        case Le(le):
            return bool(x <= le)
        case Lt(lt):
            return bool(x < lt)
        case MinLen(least):
            return len(x) >= least
        case Predicate(func):
            return bool(func(x))
    return True


def ends(hint: Any) -> Mapping[str, Any]:
    """The ends of a range of numbers, by what annotated-types calls them: ge, gt, le and lt."""
    return {name: getattr(x, name) for x in limits_of(hint) if (name := _ENDS.get(type(x)))}


def told(hint: Any) -> str | None:
    """The rule that an annotated type brings in words of its own."""
    return next((x.documentation for x in limits_of(hint) if isinstance(x, DocInfo)), None)


@cache
def rule_of(hint: Any) -> str:
    """What an annotated type asks for, in words."""
    if words := told(hint):
        return words
    if Predicate(is_odd) in limits_of(hint):
        return f"must be odd, and {ends(hint)['ge']} or more"
    match ends(hint):
        case {"ge": low, "le": high}:
            return f"must lie from {low} to {high}"
        case {"gt": low, "lt": high}:
            return f"must lie between {low} and {high}"
        case {"gt": low, "le": high}:
            return f"must be above {low}, and {high} at most"
        case {"ge": low, "lt": high}:
            return f"must be {low} or more, and below {high}"
        case {"ge": low}:
            return f"must be {low} or more"
        case {"gt": low}:
            return f"must be above {low}"
        case {"le": high}:
            return f"must be {high} at most"
        case {"lt": high}:
            return f"must be below {high}"
    least = next((x.min_length for x in limits_of(hint) if isinstance(x, MinLen)), None)
    if least is None:
        raise DefinitionError(f"{hint} has no words for its rule; add doc(...) of annotated-types")
    return f"must hold {'one' if least == 1 else least} or more"


def within(hint: Any) -> Any:
    """Some value that a type with ranges allows."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return within([kind for kind in inside if kind is not type(None)][-1])
    if origin is tuple:
        return tuple(within(kind) for kind in inside if kind is not ...)
    if origin is not Annotated:
        return None
    if hint.__origin__ is str:
        return "marked"
    match ends(hint):
        case {"gt": low, "lt": high} | {"gt": low, "le": high}:
            return (low + high) / 2
        case {"ge": end} | {"le": end}:
            return hint.__origin__(end)
        case {"gt": low}:
            return hint.__origin__(low + 1)
        case {"lt": high}:
            return hint.__origin__(high - 1)
    return within(hint.__origin__)
