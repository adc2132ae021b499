"""Ranges that fields declare: what is refused, in which words, and that every method keeps to its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, MultipleOf, Predicate

from heedful import catalogue
from heedful.authoring import (
    Layers,
    NonNegativeInt,
    OddInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    ProperShare,
    RoleName,
    Share,
    ShareBelowOne,
)
from heedful.core.asked import _hints_in, asks
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import DefinitionError, FieldError
from heedful.core.ranges import ends, outside, rule_of, within
from heedful.kit.budget import Budget
from heedful.kit.head_search import Head

ENTRIES = sorted(catalogue.entries())


class Ranged(CatalogueEntry, abstract=True):
    count: PositiveInt = 3
    share: Share = 0.5
    most: PositiveFloat | None = None
    places: tuple[NonNegativeInt, ...] = ()
    role: RoleName = "image"
    size: OddInt | None = None
    low: Annotated[float, Interval(gt=1, le=3)] = 2.0
    budget: Budget = 0.25
    heads: tuple[Head, ...] = ()
    layers: Layers = (0,)
    both: Annotated[OddInt, Ge(3)] = 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"count": 0}, "Ranged.count = 0: must be 1 or more; for example count=3"),
        ({"count": 1.5}, "Ranged.count = 1.5: must be int; for example count=3"),
        ({"share": 1.5}, "Ranged.share = 1.5: must lie from 0 to 1; for example share=0.5"),
        ({"most": 0}, "Ranged.most = 0.0: must be above 0, or None; for example most=1.0"),
        ({"most": float("inf")}, "Ranged.most = inf: must be finite; for example most=0.5"),
        ({"share": float("inf")}, "Ranged.share = inf: must lie from 0 to 1; for example share=0.5"),
        ({"places": [1, -2]}, "Ranged.places = (1, -2): each must be 0 or more; for example places=(0,)"),
        ({"places": [1.5]}, "Ranged.places = [1.5]: must be tuple[int, ...]; for example places=()"),
        ({"role": ""}, "Ranged.role = '': must name a role; for example role='image'"),
        ({"size": 4}, "Ranged.size = 4: must be odd, and 1 or more, or None; for example size=1"),
        ({"low": 1}, "Ranged.low = 1.0: must be above 1, and 3 at most; for example low=2.0"),
        ({"budget": 0}, "Ranged.budget = 0: must be a share above 0 and at most 1, as 0.25, or a whole number"),
        ({"budget": 1.5}, "Ranged.budget = 1.5: must be a share above 0 and at most 1, as 0.25, or a whole number"),
        ({"heads": [(0, 1), (-1, 0)]}, "each must be a pair of layer and head; for example heads=((0, 0),)"),
        ({"layers": ()}, "Ranged.layers = (): must name one or more layers, from 0 up; for example layers=(0,)"),
        ({"layers": (-1,)}, "Ranged.layers = (-1,): must name one or more layers, from 0 up"),
        ({"both": 1}, "Ranged.both = 1: must be odd, and 3 or more"),
    ],
)
def test_what_is_outside_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(FieldError) as error:
        Ranged(**given)
    assert told in str(error.value)


def test_what_is_inside_becomes_what_it_means() -> None:
    made = Ranged(1, 1, most=2, places=[0, 3], budget=512, heads=[[3, 1]], layers=[2])  # type: ignore[arg-type]
    assert (made.share, made.most, made.places, made.budget) == (1.0, 2.0, (0, 3), 512)
    assert (made.heads, made.layers, type(made.share)) == (((3, 1),), (2,), float)
    assert Ranged(budget=1.0).budget == 1.0


def test_what_is_not_known_is_not_passed_over() -> None:
    with pytest.raises(DefinitionError, match=r"MultipleOf\(multiple_of=2\) is no range that is asked for here"):
        outside(3, Annotated[int, MultipleOf(2)])
    with pytest.raises(DefinitionError, match="has no words for its rule"):
        outside(3, Annotated[int, Predicate(lambda n: n > 5)])
    assert outside((1,), Annotated[tuple[int, ...], MinLen(2)]) == "must hold 2 or more"


def test_arguments_have_ranges_too() -> None:
    @asks
    def verb(count: PositiveInt, share: Share = 0.5) -> float:
        return count * share

    assert verb(2) == 1.0
    with pytest.raises(FieldError, match=r"verb\(\)\.count = 0: must be 1 or more; for example count=1"):
        verb(0)


@pytest.mark.parametrize(
    ("kind", "rule", "good"),
    [
        (ProperShare, "must lie between 0 and 1", 0.5),
        (PositiveShare, "must be above 0, and 1 at most", 0.5),
        (ShareBelowOne, "must be 0 or more, and below 1", 0.0),
        (Annotated[int, Ge(3)], "must be 3 or more", 3),
        (Annotated[int, Gt(3)], "must be above 3", 4),
        (Annotated[float, Le(3)], "must be 3 at most", 3.0),
        (Annotated[float, Lt(3)], "must be below 3", 2.0),
        (Annotated[tuple[PositiveInt, ...], MinLen(1)], "must hold one or more", (1,)),
    ],
)
def test_rules_in_words_and_a_value_that_keeps_them(kind: Any, rule: str, good: Any) -> None:
    assert rule_of(kind) == rule
    assert within(kind) == good
    assert outside(good, kind) is None


def _ranged(entry: type[CatalogueEntry]) -> Iterator[tuple[Field[Any], Any]]:
    """The fields of an entry that are one number of a range, or None."""
    for field in fields(entry):
        hint = _hints_in(entry).get(field.name)
        kind = next((x for x in get_args(hint) if x is not type(None)), hint) if type(None) in get_args(hint) else hint
        if get_origin(kind) is Annotated and kind.__origin__ in (int, float):
            yield field, kind


@pytest.mark.parametrize("name", ENTRIES)
def test_a_field_refuses_what_lies_just_outside_its_range(name: str) -> None:
    entry = catalogue.entries()[name]
    for field, kind in _ranged(entry):
        assert field.default is MISSING or field.default is None or outside(field.default, kind) is None
        for end, value in ends(kind).items():
            way = {"ge": -1, "le": 1}.get(end, 0)
            beyond = value + way if kind.__origin__ is int or not way else math.nextafter(value, way * math.inf)
            with pytest.raises(FieldError, match=rf"\.{field.name} = "):
                entry(**{field.name: beyond})


@pytest.mark.parametrize("name", ENTRIES)
def test_a_field_that_is_declared_anew_keeps_its_range(name: str) -> None:
    line = [inspect.get_annotations(kind) for kind in catalogue.entries()[name].__mro__]
    for later, own in enumerate(line):
        for field in own:
            above = [hints[field] for hints in line[later + 1 :] if field in hints]
            assert not above or own[field] == above[0], f"{field} drops what its base asks for"
