"""What a lab found, in words, tables, plots and a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.core.errors import StatisticError
from heedful.core.figures import Description, Matrix
from heedful.laboratory.course import Course
from heedful.laboratory.describing import description, in_words, matrix
from heedful.laboratory.kinds import by_name, course_of
from heedful.laboratory.records import Trainings
from heedful.laboratory.results import Results, facts

if TYPE_CHECKING:
    from heedful.report.pictures import Plots


@dataclass(frozen=True, eq=False)
class Lab(Results):
    """What `lab` gives."""

    @property
    def verdict_words(self) -> Mapping[str, tuple[str, str]]:
        return {}

    @property
    def words(self) -> Mapping[str, str]:
        """What its page says otherwise than that of a comparison."""
        return {
            "over": "What replaces softmax, and what it costs",
            "matrix": "Means over seeds; below them the difference to softmax, paired by seed, with its 95% interval "
            "where there are several. Coloured where eight seeds or more put that interval on one side of zero; of "
            "many such intervals one in twenty misses zero by chance.",
        }

    @cached_property
    def _told(self) -> Description:
        return description(self)

    def description(self) -> Description:
        """Figures and sentences."""
        return self._told

    @cached_property
    def matrix(self) -> Matrix:
        """Mechanisms in rows, quantities in columns."""
        return matrix(self)

    def __str__(self) -> str:
        return in_words(self, self.description())

    def _repr_html_(self) -> str:
        from heedful.report.cells import matrix as cells

        return cells(self.matrix)

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
        return cls(facts(records), tuple(courses[name] for name in by_name() if name in courses), tuple(records))
