"""Each mechanism's numbers, and how far they lie from softmax's of the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from heedful.laboratory import costs
from heedful.laboratory.costs import PLAIN
from heedful.laboratory.course import Course, Quantity
from heedful.laboratory.differences import Difference
from heedful.laboratory.records import Record


@dataclass(frozen=True)
class Refused:
    """A mechanism that a course's model cannot be trained under, and why."""

    mechanism: str
    course: str
    reason: str


@dataclass(frozen=True)
class Found:
    """One quantity of one mechanism."""

    mechanism: str
    course: str
    quantity: str
    mean: float  # over seeds
    gap: Difference | None  # to softmax; None for softmax itself, for ratios to it and for a single seed
    seeds: int


@dataclass(frozen=True, eq=False)
class Results:
    """Records of trainings, and what they add up to."""

    facts: dict[str, Any]
    courses: tuple[Course, ...]
    records: tuple[Record, ...]
    refused: tuple[Refused, ...] = ()

    @cached_property
    def contenders(self) -> list[str]:
        """Every mechanism, softmax first."""
        return [*dict.fromkeys([PLAIN, *self.facts.get("contenders", {}), *(r.mechanism for r in self.records)])]

    def quantities(self, course: Course) -> tuple[Quantity, ...]:
        return (*course.quantities, *costs.quantities(course))

    def of(self, mechanism: str, course: str) -> dict[int, Record]:
        """A mechanism's records of a course, by seed."""
        return {r.seed: r for r in self.records if (r.mechanism, r.course) == (mechanism, course)}

    @cached_property
    def results(self) -> list[Found]:
        """One row for each mechanism and quantity that was measured."""
        out = []
        for course in self.courses:
            plain = self.of(PLAIN, course.name)
            for name in self.contenders:
                mine = self.of(name, course.name)
                for quantity in self.quantities(course):
                    values = {seed: r.numbers[quantity.name] for seed, r in mine.items() if quantity.name in r.numbers}
                    if values:
                        gap = None if name == PLAIN else _gap(values, plain, quantity)
                        mean = statistics.fmean(values.values())
                        out.append(Found(name, course.name, quantity.name, mean, gap, len(values)))
        return out

    @cached_property
    def found(self) -> dict[tuple[str, str, str], Found]:
        """The results by mechanism, course and quantity."""
        return {(r.mechanism, r.course, r.quantity): r for r in self.results}

    @property
    def inactive(self) -> list[str]:
        """Mechanisms that changed nothing in any training: each is softmax under another name."""
        asked = dict.fromkeys(r.mechanism for r in self.records if r.mechanism != PLAIN)
        return [name for name in asked if not any(r.active for r in self.records if r.mechanism == name)]


def facts(records: Sequence[Record]) -> dict[str, Any]:
    """What a page says of where its numbers come from."""
    last = max(records, key=lambda r: r.facts["date"])
    return {
        "model": "Tiny models",
        **last.facts,
        "seeds": len({r.seed for r in records}),
        "contenders": {r.mechanism: r.mechanism for r in records if r.mechanism != PLAIN},
        "tasks": dict.fromkeys(r.course for r in records),
    }


def _gap(mine: Mapping[int, float], plain: Mapping[int, Record], quantity: Quantity) -> Difference | None:
    if quantity.unit == costs.RATIO:
        return None
    both = sorted(seed for seed in mine if seed in plain and quantity.name in plain[seed].numbers)
    if len(both) < 2:
        return None
    return Difference.of([mine[seed] - plain[seed].numbers[quantity.name] for seed in both])
