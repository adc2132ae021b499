"""Changed copies: what `dataclasses.replace` gives, and nothing that was cached."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import pytest

from heedful.core.values import replace


@dataclasses.dataclass(frozen=True)
class Circle:
    radius: float
    value: str = "round"  # a field of the name of an argument

    @cached_property
    def area(self) -> float:
        return 3 * self.radius**2


def test_it_is_what_dataclasses_would_give() -> None:
    circle = Circle(1.0)
    assert circle.area == 3
    for changes in ({}, {"radius": 2.0}, {"value": "flat"}, {"radius": 2.0, "value": "flat"}):
        found = replace(circle, **changes)
        assert found == dataclasses.replace(circle, **changes)  # type: ignore[arg-type]
        assert found.area == 3 * found.radius**2, "what was cached before is not true any more"
    assert circle == Circle(1.0)


@pytest.mark.parametrize("looked", [False, True])
def test_a_field_that_is_not_there_is_an_error(looked: bool) -> None:
    circle = Circle(1.0)
    if looked:
        assert circle.area == 3
    with pytest.raises(TypeError, match="Circle has no field 'colour'"):
        replace(circle, colour="red")
    with pytest.raises(TypeError, match="Circle has no field 'area'"):
        replace(circle, area=4)
