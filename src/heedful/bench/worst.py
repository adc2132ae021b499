"""What each method does on the task where it loses most, beside what the unedited model does there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from heedful.bench.intervals import Gap
from heedful.bench.numbers import rounded, task_name
from heedful.bench.results import PLAIN, Results
from heedful.core.figures import Listing, percent

LEAST = 2  # tasks, below which there is no worst one


@dataclass(frozen=True)
class Worst:
    """The task on which a method loses most of what the unedited model knows, in nats a token."""

    task: str
    plain: float  # log-probability of what is right, of the unedited model on the same prompts
    gap: Gap  # the method's less that; below zero it loses
    of: int  # tasks


def worst(c: Results) -> dict[str, Worst]:
    """The worst task of each method that changed something and was asked two tasks or more that can tell a loss."""
    found = {}
    for name in c.contenders:
        mine = [
            (r.nats_gap.mean, r.task, r.nats, r.nats_gap)
            for r in c.results
            if r.contender == name and r.nats_gap is not None and r.task not in c.blind
        ]
        if name == PLAIN or name in c.inactive or len(mine) < LEAST:
            continue
        less, task, nats, gap = min(mine, key=lambda each: each[0])
        found[name] = Worst(task, nats - less, gap, len(mine))
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
        return name, *shares, task_name(c, it.task), rounded(it.plain, 3), rounded(it.gap.mean, 3), *ends

    yield Listing(
        "worst",
        "The worst task of each",
        "The task where a method loses most: the right answer's log-probability, nats a token, of the unedited model, "
        "and the difference to it. Tasks are unlike one another, so no mean is taken over them. Of several tasks alike "
        "one comes out worst by chance, so look at its interval.",
        ("method", "cache", "pairs", "worst task", "unedited", "difference", "low", "high"),
        [row(name, it) for name, it in found],
    )


def sentence(c: Results) -> str:
    """Which method loses least on its worst task, of those asked most tasks."""
    found = worst(c)
    most = max((it.of for it in found.values()), default=0)
    found = {name: it for name, it in found.items() if it.of == most}  # who was refused a hard one would look best
    if len(found) < LEAST:
        return ""
    least = max(found, key=lambda name: found[name].gap.mean)
    it = found[least]
    return (
        f"On the task where each does worst, {least} does best: {it.gap.mean:+.2f} nats a token on "
        f"{task_name(c, it.task)}, where the unedited model has {it.plain:.2f}."
    )
