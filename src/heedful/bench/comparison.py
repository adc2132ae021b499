"""A comparison: what was found, in words, tables, plots and a page; it saves, loads and adds up."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.bench.describing import description, in_words
from heedful.bench.intervals import Gap
from heedful.bench.matrix import VERDICTS, matrix
from heedful.bench.numbers import margin
from heedful.bench.records import Answered, line, merged, read
from heedful.bench.results import Price, Result, Results
from heedful.core.asked import asks
from heedful.core.errors import FieldError, StatisticError
from heedful.core.figures import Description, Matrix, counted, percent
from heedful.core.files import RECORDS, replace_text, writing

if TYPE_CHECKING:
    from heedful.report.pictures import Plots

ENDS = ("", "_low", "_high")


@dataclass(frozen=True, eq=False)
class Comparison(Results):
    """What `compare` gives."""

    @cached_property
    def _told(self) -> Description:
        return description(self)

    def description(self) -> Description:
        """Figures and sentences."""
        return self._told

    @property
    def verdict_words(self) -> dict[str, tuple[str, str]]:
        """What each verdict of the matrix means."""
        return VERDICTS

    @property
    def words(self) -> dict[str, str]:
        """What its page says of it."""
        text = (
            "Differences to the baseline, the unedited model, on the same prompts. All intervals hold at once with "
            f"95%, at whatever prompt asking stops; coloured where that decides. The margin is {margin(self)}."
        )
        if self.prices:
            held, turns = self.prices[0].held, self.prices[0].turns
            text += f" Of times, the median of {counted(turns, 'timing repeat')} beside the baseline" + (
                f", with the lowest and the highest, which hold it with {percent(held)}." if turns > 1 else "."
            )
        return {"matrix": text}

    @cached_property
    def matrix(self) -> Matrix:
        """A verdict, the differences and the costs of each method, in rows."""
        return matrix(self)

    def __str__(self) -> str:
        return in_words(self, self.description(), self.matrix)

    def __repr__(self) -> str:
        tasks = ", ".join(task["name"] for task in self.facts["tasks"].values())
        answers = sum(isinstance(record, Answered) for record in self.records)
        return f"Comparison({self.facts['model']}: {len(self.contenders) - 1} methods on {tasks}, {answers} answers)"

    def to_pandas(self) -> dict[str, Any]:
        """`results`, `costs` and `refused` as data frames."""
        import pandas as pd

        def columns(name: str, *ends: float) -> dict[str, float]:
            return {f"{name}{end}": x for end, x in zip(ENDS, ends, strict=True)}

        def row(result: Result) -> dict[str, Any]:
            out = dict(vars(result))
            for name in ("gap", "nats_gap"):
                gap: Gap | None = out.pop(name)
                out |= columns(name, *((math.nan,) * 3 if gap is None else (gap.mean, gap.low, gap.high)))
            return out

        def costs(price: Price) -> dict[str, Any]:
            out = dict(vars(price))
            for name, ratio in out.pop("ratios").items():
                out |= columns(f"{name}_ratio", ratio.median, ratio.low, ratio.high)
            return out

        return {
            "results": pd.DataFrame([row(r) for r in self.results]),
            "costs": pd.DataFrame([costs(p) for rows in self.batches for p in self.priced[rows]]),
            "refused": pd.DataFrame([vars(r) for r in self.refused]),
        }

    def _repr_html_(self) -> str:
        from heedful.report.cells import matrix

        return matrix(self.matrix)

    @property
    def plot(self) -> Plots:
        """`comparison.plot.pareto()` and the others, as plotly figures."""
        from heedful.report.pictures import Plots

        return Plots(self.description().figures)

    @asks
    def page(self, path: str | Path) -> Path:
        """One self-contained HTML page."""
        from heedful.report.compared import write

        return write(self, path)

    @asks
    def save(self, path: str | Path) -> Path:
        """All records in one file, as `load` reads them."""
        path = Path(path)
        lines = [json.dumps({"record": "facts", **self.facts}), *map(line, self.records)]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "\n".join(lines) + "\n")
        return path

    @classmethod
    def load(cls, *paths: str | Path) -> Comparison:
        """One file of records, or several as one; a folder stands for the file that `compare` wrote there."""
        for p in paths or (None,):
            if not isinstance(p, str | Path) or not str(p):
                raise FieldError("Comparison.load()", "path", p, "must be a file of records, or its folder", "kept")
        files = [Path(p) / RECORDS if Path(p).is_dir() else Path(p) for p in paths]
        facts, records = merged(map(read, files))
        if not facts["tasks"]:
            raise StatisticError(f"{', '.join(map(str, files))}: holds no comparison; its first line is gone")
        return cls(facts, tuple(records))

    @asks
    def __add__(self, other: Comparison) -> Comparison:
        facts, records = merged([(self.facts, self.records), (other.facts, other.records)])
        return Comparison(facts, tuple(records))
