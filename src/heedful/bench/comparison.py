"""What a comparison found: paired differences with their intervals, and costs as ratios to the unedited model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heedful.bench.cost import WARM_UP
from heedful.bench.records import Answered, Cost, Record, Refused, line, merged, read
from heedful.core.errors import StatisticError
from heedful.core.figures import Description, Matrix
from heedful.core.files import RECORDS, replace_text, writing

if TYPE_CHECKING:
    from heedful.report.pictures import Plots

PLAIN = "unedited"  # the model as it is
SHARE = "share right"  # the unit of scores from 0 to 1
DRAWS, SURE = 2000, 0.95  # bootstrap
FLIPS = 9999  # sign flips of a test
FEW = 8  # prompts below which no difference is called sure


def _widening(n: int) -> float:
    """How much too narrow the bootstrap interval of n numbers is, which divides by n and knows no Student's t."""
    t = 1.96 + 2.37 / (n - 1) + 2.82 / (n - 1) ** 2  # the 97.5 % quantile with n - 1 degrees of freedom, expanded
    return math.sqrt(n / (n - 1)) * t / 1.96


@dataclass(frozen=True)
class Gap:
    """A mean paired difference to the unedited model, and its bootstrap interval over prompts."""

    mean: float
    low: float
    high: float
    prompts: int  # of the task with the fewest

    @classmethod
    def of(cls, *differences: Sequence[float], most: float = math.inf) -> Gap:
        """Of one task's differences, or the mean of several tasks'; none can lie further from zero than `most`."""
        draw = torch.Generator().manual_seed(0)
        means = []
        for task in differences:
            x = torch.tensor(task, dtype=torch.float64)
            drawn = x[torch.randint(len(x), (DRAWS, len(x)), generator=draw)].mean(1)
            means.append(x.mean() + (drawn - x.mean()) * _widening(len(x)))
        ends = torch.tensor([(1 - SURE) / 2, (1 + SURE) / 2], dtype=torch.float64)
        low, high = torch.stack(means).mean(0).quantile(ends).clamp(-most, most).tolist()
        return cls(statistics.fmean(map(statistics.fmean, differences)), low, high, min(map(len, differences)))

    @property
    def sure(self) -> bool:
        """The interval lies on one side of zero, and there are prompts enough for it to mean something."""
        return self.prompts >= FEW and (self.low > 0 or self.high < 0)


def luck(differences: Sequence[float]) -> float:
    """How often chance alone gives a mean at least so far from zero, were each difference as likely of either sign."""
    x = torch.tensor(differences, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    flipped = (torch.randint(0, 2, (FLIPS, len(x)), generator=draw).double() * 2 - 1) @ x
    far = x.sum().abs() - x.abs().sum() * torch.finfo(x.dtype).eps * len(x)  # equal sums count whatever their rounding
    return (1 + int((flipped.abs() >= far).sum())) / (1 + FLIPS)


@dataclass(frozen=True)
class Result:
    """One contender on one task."""

    contender: str
    task: str
    prompts: int
    score: float  # mean, in the task's unit
    gap: Gap | None  # of the score; None for the unedited model itself
    nats: float  # mean log-probability of what is right, a token
    nats_gap: Gap | None
    active: bool  # whether the method changed anything at all


@dataclass(frozen=True)
class Price:
    """What one contender costs on the longest prompt; ratios are medians of turns with the unedited model."""

    contender: str
    tokens: int
    prefill: float  # seconds
    prefill_ratio: float
    step: float  # seconds a token
    step_ratio: float
    peak: int | None  # bytes above the resting model
    cache: int  # bytes
    cache_ratio: float
    density: float | None  # pairs computed, of a causal map's
    backends: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Records, and what they add up to."""

    facts: dict[str, Any]
    records: tuple[Record, ...]

    @cached_property
    def contenders(self) -> list[str]:
        """Every name, the unedited model first, then in the order of asking."""
        found = dict.fromkeys([PLAIN, *self.facts.get("contenders", {})])
        return [*dict.fromkeys([*found, *(r.contender for r in self.records)])]

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What is known of each task, by its full name."""
        return dict(self.facts.get("tasks", {}))

    @cached_property
    def _pairs(self) -> dict[tuple[str, str], list[tuple[Answered, Answered]]]:
        """Answers beside the unedited model's to the same prompts, by task and contender."""
        by: dict[tuple[str, str], dict[tuple[int, int], Answered]] = {}
        for r in self.records:
            if isinstance(r, Answered):
                by.setdefault((r.task, r.contender), {})[r.seed, r.number] = r
        out = {}
        refused = {(r.task, r.contender) for r in self.refused}  # the few prompts answered before say nothing
        for task in self.tasks:
            plain = by.get((task, PLAIN), {})
            for name in self.contenders:
                mine = by.get((task, name), {})
                both = sorted(set(mine) & set(plain))
                if len(both) >= 2 and (task, name) not in refused:
                    out[task, name] = [(mine[k], plain[k]) for k in both]
        return out

    @cached_property
    def results(self) -> list[Result]:
        """One row for each contender and task that both it and the unedited model have answered."""
        return [
            _result(name, task, pairs, 1.0 if self.tasks[task]["unit"] == SHARE else math.inf)
            for (task, name), pairs in self._pairs.items()
        ]

    @cached_property
    def inactive(self) -> list[str]:
        """Contenders that never changed anything: each is the unedited model under another name."""
        asked = dict.fromkeys(r.contender for r in self.results if r.contender != PLAIN)
        return [name for name in asked if not any(r.active for r in self.results if r.contender == name)]

    @cached_property
    def verdicts(self) -> dict[tuple[str, str], str]:
        """By task and contender, "better" or "worse" than the unedited model where that is sure, else "".

        With many pairs of method and task some look sure by chance; Holm's correction holds the chance that any does
        to 5 %. What changed nothing is no pair.
        """
        told = {(r.task, r.contender): r for r in self.results if r.gap is not None and r.active}
        chances = {key: luck([a.score - b.score for a, b in self._pairs[key]]) for key in told}
        found = dict.fromkeys(told, "")
        for rank, key in enumerate(sorted(chances, key=lambda k: chances[k])):
            if chances[key] * (len(told) - rank) > 1 - SURE:
                break
            gap = told[key].gap
            if gap is not None and gap.sure:
                found[key] = "better" if (gap.mean > 0) == self.tasks[key[0]]["more_is_better"] else "worse"
        return found

    @cached_property
    def worth(self) -> dict[str, Gap]:
        """How much likelier each contender makes what is right, nats a token, mean over the tasks that it answered."""
        differences: dict[str, list[list[float]]] = {}
        for (_, name), pairs in self._pairs.items():
            if name != PLAIN:
                differences.setdefault(name, []).append([a.nats - b.nats for a, b in pairs])
        return {name: Gap.of(*found) for name, found in differences.items()}

    @cached_property
    def prices(self) -> list[Price]:
        """One row for each contender measured on the same machine and prompt as the unedited model."""
        costs = [r for r in self.records if isinstance(r, Cost)]
        place = max(((r.tokens, r.machine) for r in costs if r.contender == PLAIN), default=None)
        if place is None:
            return []
        by: dict[str, dict[int, Cost]] = {}
        for r in costs:
            if (r.tokens, r.machine) == place:
                by.setdefault(r.contender, {})[r.turn] = r
        plain = by[PLAIN]
        return [_price(by[name], plain) for name in self.contenders if set(by.get(name, {})) & set(plain) - {WARM_UP}]

    @property
    def refused(self) -> list[Refused]:
        return [r for r in self.records if isinstance(r, Refused)]

    @cached_property
    def _told(self) -> Description:
        from heedful.bench.describing import description

        return description(self)

    def description(self) -> Description:
        """Figures and sentences."""
        return self._told

    @property
    def verdict_words(self) -> dict[str, tuple[str, str]]:
        """What each verdict of the matrix means."""
        from heedful.bench.matrix import VERDICTS

        return VERDICTS

    @cached_property
    def matrix(self) -> Matrix:
        """A verdict, the differences and the costs of each method, in rows."""
        from heedful.bench.matrix import matrix

        return matrix(self)

    def __str__(self) -> str:
        from heedful.bench.describing import in_words

        return in_words(self)

    def to_pandas(self) -> dict[str, Any]:
        """`results`, `costs` and `refused` as data frames."""
        import pandas as pd

        def row(result: Result) -> dict[str, Any]:
            out: dict[str, Any] = {k: x for k, x in vars(result).items() if not isinstance(x, Gap) and x is not None}
            for name in ("gap", "nats_gap"):
                gap: Gap | None = getattr(result, name)
                out |= {f"{name}{end}": math.nan if gap is None else getattr(gap, part) for end, part in ENDS}
            return out

        return {
            "results": pd.DataFrame([row(r) for r in self.results]),
            "costs": pd.DataFrame([vars(p) for p in self.prices]),
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

    def page(self, path: str | Path) -> Path:
        """One self-contained HTML page."""
        from heedful.report.compared import write

        return write(self, path)

    def save(self, path: str | Path) -> Path:
        """All records in one file, as `load` reads them."""
        import json

        path = Path(path)
        lines = [json.dumps({"record": "facts", **self.facts}), *map(line, self.records)]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "\n".join(lines) + "\n")
        return path

    @classmethod
    def load(cls, *paths: str | Path) -> Comparison:
        """One file of records, or several as one; a folder stands for the file that `compare` wrote there."""
        files = [Path(p) / RECORDS if Path(p).is_dir() else Path(p) for p in paths]
        facts, records = merged(map(read, files))
        if not facts["tasks"]:
            raise StatisticError(f"{', '.join(map(str, files))}: holds no comparison; its first line is gone")
        return cls(facts, tuple(records))

    def __add__(self, other: Comparison) -> Comparison:
        facts, records = merged([(self.facts, self.records), (other.facts, other.records)])
        return Comparison(facts, tuple(records))


ENDS = (("", "mean"), ("_low", "low"), ("_high", "high"))


def _result(name: str, task: str, pairs: list[tuple[Answered, Answered]], most: float) -> Result:
    mine = [a for a, _ in pairs]
    score, nats = (statistics.fmean(getattr(a, field) for a in mine) for field in ("score", "nats"))
    if name == PLAIN:
        return Result(name, task, len(pairs), score, None, nats, None, False)
    gap = Gap.of([a.score - b.score for a, b in pairs], most=most)
    nats_gap = Gap.of([a.nats - b.nats for a, b in pairs])
    return Result(name, task, len(pairs), score, gap, nats, nats_gap, any(a.active for a in mine))


def _price(mine: dict[int, Cost], plain: dict[int, Cost]) -> Price:
    turns = sorted(set(mine) & set(plain) - {WARM_UP})
    one = mine[turns[0]]

    def middle(field: str, against: bool) -> float:
        return statistics.median(getattr(mine[t], field) / (getattr(plain[t], field) if against else 1) for t in turns)

    peak = mine[WARM_UP].peak if WARM_UP in mine else None
    return Price(
        one.contender, one.tokens, middle("prefill", False), middle("prefill", True), middle("step", False),
        middle("step", True), peak, one.cache, one.cache / max(1, plain[turns[0]].cache), one.density, one.backends,
    )  # fmt: skip
