"""What records add up to: paired differences with their intervals, and costs as ratios to the unedited model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from heedful.bench.cost import WARM_UP
from heedful.bench.intervals import LEAST, SURE, Gap
from heedful.bench.records import Answered, Cost, Record, Refused

PLAIN = "unedited"  # the model as it is
SHARE = "share right"  # the unit of scores from 0 to 1
WRONG = "share of words wrong"  # that of word errors, of which there may be more than words
POINTS = (SHARE, WRONG)  # units of which a hundredth is a point
MARGIN = 0.05  # of a share, or nats: how much worse a safe method may be, where nobody says


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
class Ratio:
    """Of a cost to the unedited model's: the median of turns, the lowest and the highest; equal where it is counted."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, turns: Sequence[float]) -> Ratio:
        return cls(statistics.median(turns), min(turns), max(turns))


@dataclass(frozen=True)
class Price:
    """What one contender costs on a batch of the longest prompt.

    The ends of a ratio hold it with a probability of `held`, whatever times are distributed like.
    """

    contender: str
    batch: int
    tokens: int  # of one row
    turns: int
    prefill: float  # seconds
    token: float | None  # seconds, of every row; None where no token follows
    cache: int  # bytes of all rows
    peak: int | None  # bytes above the resting model
    ratios: Mapping[str, Ratio]  # of "prefill", "token", "cache" and, where they are known, "pairs" of a causal map
    backends: tuple[str, ...]

    @property
    def held(self) -> float:
        return 1 - 2.0 ** (1 - self.turns)

    @property
    def read_rate(self) -> float:
        """Tokens of prompts a second."""
        return self.batch * self.tokens / self.prefill

    @property
    def write_rate(self) -> float | None:
        """Tokens that follow a second."""
        return None if self.token is None else self.batch / self.token


@dataclass(frozen=True, eq=False)
class Results:
    """Records, and what they add up to; `Comparison` is how people meet them."""

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

    @property
    def margin(self) -> float:
        """How much worse a method may be and still be called safe: of a share, or nats."""
        return float(self.facts.get("margin", MARGIN))

    @cached_property
    def idle(self) -> set[tuple[str, str]]:
        """Task and contender where nothing was changed: the answers are the unedited model's."""
        return {key for key, pairs in self._pairs.items() if not any(a.active for a, _ in pairs)}

    @cached_property
    def inactive(self) -> list[str]:
        """Contenders that never changed anything: each is the unedited model under another name."""
        asked = dict.fromkeys(name for _, name in self._pairs if name != PLAIN)
        return [name for name in asked if all(key in self.idle for key in self._pairs if key[1] == name)]

    def reason(self, name: str) -> str:
        """Why a contender changed nothing, on the last prompt where that is known."""
        known = (r.reason for r in reversed(self.records) if isinstance(r, Answered) and r.contender == name)
        return next(filter(None, known), "")

    @cached_property
    def blind(self) -> list[str]:
        """Tasks on which the unedited model does not beat guessing by the margin: no loss can show there."""
        out = []
        for task, about in self.tasks.items():
            pairs = self._pairs.get((task, PLAIN), ())
            if about["unit"] in POINTS and len(pairs) >= LEAST:
                better = 1 if about["more_is_better"] else -1
                above = better * statistics.fmean(a.score - (a.chance or 0.0) for a, _ in pairs)
                out += [task] * (above <= self.margin)
        return out

    @cached_property
    def compared(self) -> int:
        """For how many pairs of method and task an interval has to hold: all but those that have nothing to tell."""
        never = self.idle | {(r.task, r.contender) for r in self.refused}
        tasks = [task for task in self.tasks if task not in self.blind]
        return max(1, sum((task, n) not in never for task in tasks for n in self.contenders if n != PLAIN))

    @cached_property
    def results(self) -> list[Result]:
        """One row for each contender and task that both it and the unedited model have answered."""
        risk = (1 - SURE) / self.compared
        most = {task: 1.0 if about["unit"] == SHARE else math.inf for task, about in self.tasks.items()}
        return [_result(name, task, pairs, most[task], risk) for (task, name), pairs in self._pairs.items()]

    @cached_property
    def verdicts(self) -> dict[tuple[str, str], str]:
        """By task and contender, "better", "safe" or "worse" than the unedited model where that is sure, else "".

        All intervals hold at once and at any number of prompts, so that the chance of any false verdict is 5 % at most,
        however many methods are compared and whenever asking stops.
        """
        return {
            (r.task, r.contender): r.gap.says(self.tasks[r.task]["more_is_better"], self.margin)
            for r in self.results
            if r.gap is not None and r.active and r.task not in self.blind
        }

    def verdict(self, name: str) -> str:
        """What all tasks say of a method together: helps, safe, unclear, harms, inactive or refused."""
        if name in self.inactive:
            return "inactive"
        refused = [r.task for r in self.refused if r.contender == name and r.task in self.tasks]
        if refused and not any(key[1] == name for key in self.verdicts):
            return "refused"
        told = [task for task in self.tasks if task not in (*self.blind, *refused) and (task, name) not in self.idle]
        words = {self.verdicts.get((task, name), "") for task in told}
        if "worse" in words:
            return "harms"
        if not words or "" in words:
            return "unclear"
        return "helps" if "better" in words else "unclear" if refused else "safe"

    @cached_property
    def open(self) -> list[tuple[str, str]]:
        """Task and contender where more prompts may still change the verdict on the contender."""
        return [key for key, word in self.verdicts.items() if not word and self.verdict(key[1]) != "harms"]

    @cached_property
    def worth(self) -> dict[str, Gap]:
        """How much likelier each contender makes what is right, nats a token, mean over the tasks that it answered."""
        found: dict[str, list[Gap]] = {}
        for r in self.results:
            if r.nats_gap is not None:
                found.setdefault(r.contender, []).append(r.nats_gap)
        return {name: Gap.mean_of(gaps) for name, gaps in found.items()}

    @property
    def batches(self) -> list[int]:
        """The sizes for which costs were asked; what is compared at one size alone is so at the first."""
        return list(self.facts.get("batch", [1]))

    @property
    def limit(self) -> int | None:
        """How many bytes the cache may take, where somebody said."""
        return self.facts.get("cache")

    @cached_property
    def priced(self) -> dict[int, list[Price]]:
        """By batch, one row for each contender measured on the same machine and prompt as the unedited model."""
        costs = [r for r in self.records if isinstance(r, Cost) and r.batch in self.batches]
        place = max(((r.tokens, r.machine) for r in costs if r.contender == PLAIN), default=None)
        by: dict[tuple[int, str], dict[int, Cost]] = {}
        for r in costs:
            if (r.tokens, r.machine) == place:
                by.setdefault((r.batch, r.contender), {})[r.turn] = r
        found = {}
        for batch in self.batches:
            plain = by.get((batch, PLAIN), {})
            timed = [by[batch, n] for n in self.contenders if set(by.get((batch, n), {})) & set(plain) - {WARM_UP}]
            found[batch] = [price(mine, plain) for mine in timed]
        return found

    @property
    def prices(self) -> list[Price]:
        """The same at the first batch."""
        return self.priced[self.batches[0]]

    @property
    def refused(self) -> list[Refused]:
        return [r for r in self.records if isinstance(r, Refused)]


def _result(name: str, task: str, pairs: list[tuple[Answered, Answered]], most: float, risk: float) -> Result:
    mine = [a for a, _ in pairs]
    score, nats = (statistics.fmean(getattr(a, field) for a in mine) for field in ("score", "nats"))
    if name == PLAIN:
        return Result(name, task, len(pairs), score, None, nats, None, False)
    gap = Gap.of([a.score - b.score for a, b in pairs], risk, most)
    nats_gap = Gap.of([a.nats - b.nats for a, b in pairs], risk)
    return Result(name, task, len(pairs), score, gap, nats, nats_gap, any(a.active for a in mine))


def price(mine: dict[int, Cost], plain: dict[int, Cost]) -> Price:
    """What the turns of one contender add up to, against the turns of the unedited model."""
    turns = sorted(set(mine) & set(plain) - {WARM_UP})
    one = mine[turns[0]]

    ratios = {
        "prefill": Ratio.of([mine[t].prefill / plain[t].prefill for t in turns]),
    }
    steps = [(mine[t].step, plain[t].step) for t in turns]
    if follows := [a / b for a, b in steps if a is not None and b is not None]:
        ratios["token"] = Ratio.of(follows)
        ratios["cache"] = Ratio.of([one.cache / max(1, plain[turns[0]].cache)])
    if one.density is not None:
        ratios["pairs"] = Ratio.of([one.density])
    prefill = statistics.median(mine[t].prefill for t in turns)
    token = statistics.median(a for a, _ in steps if a is not None) if follows else None
    peak = mine[WARM_UP].peak if WARM_UP in mine else None
    about = one.contender, one.batch, one.tokens, len(turns)
    return Price(*about, prefill, token, one.cache, peak, ratios, one.backends)
