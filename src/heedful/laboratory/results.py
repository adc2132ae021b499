"""What a lab found: each mechanism's numbers, and how far they lie from softmax's of the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.bench.comparison import Gap
from heedful.core.errors import StatisticError
from heedful.core.figures import Description, Matrix
from heedful.laboratory import costs
from heedful.laboratory.costs import PLAIN
from heedful.laboratory.course import Course, Quantity
from heedful.laboratory.kinds import course_of
from heedful.laboratory.records import Record, Trainings

if TYPE_CHECKING:
    from heedful.report.pictures import Plots


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
    gap: Gap | None  # to softmax, paired by seed; None for softmax itself, for ratios to it and for a single seed
    seeds: int


@dataclass(frozen=True, eq=False)
class Lab:
    """Records of trainings, and what they add up to."""

    facts: dict[str, Any]
    courses: tuple[Course, ...]
    records: tuple[Record, ...]
    refused: tuple[Refused, ...] = ()

    @cached_property
    def contenders(self) -> list[str]:
        """Every mechanism, softmax first."""
        return [*dict.fromkeys([PLAIN, *self.facts.get("contenders", {}), *(r.mechanism for r in self.records)])]

    @property
    def verdict_words(self) -> Mapping[str, tuple[str, str]]:
        return {}

    @property
    def words(self) -> Mapping[str, str]:
        """What its page says otherwise than that of a comparison."""
        return {
            "over": "What replaces softmax, and what it costs",
            "matrix": "Means over seeds; below them the difference to softmax, paired by seed, with its 95 % interval "
            "where there are several. Coloured where eight seeds or more put that interval on one side of zero; of "
            "many such intervals one in twenty misses zero by chance.",
        }

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

    @cached_property
    def _told(self) -> Description:
        from heedful.laboratory.describing import description

        return description(self)

    def description(self) -> Description:
        """Figures and sentences."""
        return self._told

    @cached_property
    def matrix(self) -> Matrix:
        """Mechanisms in rows, quantities in columns."""
        from heedful.laboratory.describing import matrix

        return matrix(self)

    def __str__(self) -> str:
        from heedful.laboratory.describing import in_words

        return in_words(self)

    def to_pandas(self) -> Any:
        """A row for each training, with its numbers."""
        import pandas as pd

        plain = ("mechanism", "course", "seed", "parameters", "learned", "active", "seconds")
        return pd.DataFrame([{name: getattr(r, name) for name in plain} | r.numbers for r in self.records])

    @property
    def plot(self) -> Plots:
        """`lab.plot.lengths()` and the others, as plotly figures."""
        from heedful.report.pictures import Plots

        return Plots(self.description().figures)

    def page(self, path: str | Path) -> Path:
        """One self-contained HTML page."""
        from heedful.report.compared import write

        return write(self, path)

    @classmethod
    def load(cls, folder: str | Path) -> Lab:
        """All trainings of a folder, which must share their settings."""
        if not Path(folder).is_dir():
            raise StatisticError(f"{folder} is no folder; name the one that the lab wrote its records to")
        records = Trainings(Path(folder)).all()
        if not records:
            raise StatisticError(f"{folder} holds no training; name the folder that the lab wrote its records to")
        courses: dict[str, Course] = {}
        for record in records:
            course = course_of(record.course, record.settings)
            if (other := courses.setdefault(record.course, course)) != course:
                raise StatisticError(
                    f"{folder} holds trainings of unlike settings, {other} and {course}, which are no one table: run "
                    "the lab on it with the settings that you mean"
                )
        return cls(facts(records), tuple(courses.values()), tuple(records))


def facts(records: Sequence[Record]) -> dict[str, Any]:
    """What a page says of where its numbers come from."""
    last = max(records, key=lambda r: r.facts["date"])
    return {
        "model": "Tiny models",
        **last.facts,
        "seeds": len({r.seed for r in records}),
        "contenders": dict.fromkeys(r.mechanism for r in records if r.mechanism != PLAIN),
        "tasks": dict.fromkeys(r.course for r in records),
    }


def _gap(mine: Mapping[int, float], plain: Mapping[int, Record], quantity: Quantity) -> Gap | None:
    if quantity.unit == costs.RATIO:
        return None
    both = sorted(seed for seed in mine if seed in plain and quantity.name in plain[seed].numbers)
    if len(both) < 2:
        return None
    return Gap.of([mine[seed] - plain[seed].numbers[quantity.name] for seed in both])
