"""What each method does on the task where it loses most, beside what it does on the average of tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from heedful.bench.intervals import Gap
from heedful.bench.numbers import rounded, task_name
from heedful.bench.results import PLAIN, Results
from heedful.core.figures import Listing, percent

LEAST = 2  # tasks, below which the worst is the mean


@dataclass(frozen=True)
class Worst:
    """How much likelier a method makes what is right, nats a token; below zero it loses."""

    mean: float  # over tasks
    task: str  # where it is least
    gap: Gap  # there
    of: int  # tasks


def worst(c: Results) -> dict[str, Worst]:
    """The worst task of each method that changed something and was asked two tasks or more that can tell a loss."""
    found = {}
    for name in c.contenders:
        mine = {
            r.task: r.nats_gap
            for r in c.results
            if r.contender == name and r.nats_gap is not None and r.task not in c.blind
        }
        if name == PLAIN or name in c.inactive or len(mine) < LEAST:
            continue
        task = min(mine, key=lambda task: mine[task].mean)
        found[name] = Worst(sum(gap.mean for gap in mine.values()) / len(mine), task, mine[task], len(mine))
    return found


def listing(c: Results) -> Iterable[Listing]:
    """A row for each method, the one that loses least on its worst task first."""
    found = sorted(worst(c).items(), key=lambda row: -row[1].gap.mean)
    if not found:
        return
    costs = {p.contender: p.ratios for p in c.prices}

    def row(name: str, it: Worst) -> tuple[object, ...]:
        ratios = costs.get(name, {})
        shares = [percent(ratios[cost].median) if cost in ratios else None for cost in ("cache", "pairs")]
        ends = [rounded(x, 3) if math.isfinite(x) else None for x in (it.gap.low, it.gap.high)]
        return name, *shares, rounded(it.mean, 3), task_name(c, it.task), rounded(it.gap.mean, 3), *ends

    yield Listing(
        "worst",
        "The worst task of each",
        "The difference in the right answer's log-probability, nats a token, on the mean of tasks and on the one where "
        "a method loses most: a mean may hide that a task is lost. Of several tasks alike one comes out worst by "
        "chance, so look at its interval.",
        ("method", "cache", "pairs", "mean", "worst task", "there", "low", "high"),
        [row(name, it) for name, it in found],
    )


def sentence(c: Results) -> str:
    """Which method is best by the mean and which by its worst task, where these are two, of those asked most tasks."""
    found = worst(c)
    most = max((it.of for it in found.values()), default=0)
    found = {name: it for name, it in found.items() if it.of == most}  # who was refused a hard one would look best
    if len(found) < LEAST:
        return ""
    mean, least = (max(found, key=key) for key in (lambda n: found[n].mean, lambda n: found[n].gap.mean))
    if mean == least:
        return ""
    one, other = found[mean], found[least]
    return (
        f"On the mean of tasks {mean} does best ({one.mean:+.2f} nats a token), on each one's worst task {least}: "
        f"{other.gap.mean:+.2f} on {task_name(c, other.task)}, where {mean} has {one.gap.mean:+.2f} on "
        f"{task_name(c, one.task)}."
    )
