"""Methods by tasks and costs at one glance, and one verdict for each method."""

from __future__ import annotations

from heedful.bench.numbers import direction, number, task_name, units
from heedful.bench.results import PLAIN, Gap, Result, Results
from heedful.core.figures import Cell, Matrix

HARMLESS = 0.05  # of the share right, or nats: how much worse the far end of a safe method's intervals may lie
VERDICTS = {
    "helps": ("better on some task and worse on none", "good"),
    "safe": ("no interval reaches further than 5 points or 0.05 nats to the worse side", "good"),
    "unclear": (
        "some interval reaches further than that, yet no loss is sure after Holm's correction; ask more prompts",
        "",
    ),
    "harms": ("worse on some task, surely", "bad"),
    "inactive": ("changed nothing here", "quiet"),
    "refused": ("could not be asked", "quiet"),
}
COSTS = {"prefill": "prefill_ratio", "token": "step_ratio", "cache": "cache_ratio"}


def verdict(c: Results, name: str) -> str:
    """What the comparison says of a method as a whole, a word of VERDICTS."""
    mine = [r for r in c.results if r.contender == name]
    if not mine:
        return "refused"
    if name in c.inactive:
        return "inactive"
    words = {c.verdicts.get((r.task, name)) for r in mine}
    if "worse" in words:
        return "harms"
    if "better" in words:
        return "helps"
    safe = all(r.gap is not None and _worst(r.gap, c, r.task) <= HARMLESS for r in mine)
    return "safe" if safe and not any(r.contender == name for r in c.refused) else "unclear"


def _worst(gap: Gap, c: Results, task: str) -> float:
    """How much worse the task may be at the far end of the interval."""
    return -gap.low if c.tasks[task]["more_is_better"] else gap.high


def matrix(c: Results) -> Matrix:
    """A row for each method, a column for each task and cost; the unedited model first."""
    tasks = [task for task in c.tasks if any(r.task == task for r in c.results)]
    costs = COSTS if c.prices else {}
    columns = [("verdict", "")]
    for task in tasks:
        about = c.tasks[task]
        columns.append((task_name(c, task), f"{units(about['unit'])}, {direction(about)} is better"))
    columns += [(name, "× unedited") for name in costs]
    found = {(r.contender, r.task): r for r in c.results}
    prices = {p.contender: p for p in c.prices}

    def row(name: str) -> tuple[Cell, ...]:
        word = "" if name == PLAIN else verdict(c, name)
        judged = Cell(word, "", float(list(VERDICTS).index(word)), VERDICTS[word][1]) if word else Cell("", "", -1.0)
        scores = [_score(c, found.get((name, task)), task, word) for task in tasks]
        price = prices.get(name) if word != "inactive" else None
        ratios = [Cell("") if price is None else _ratio(getattr(price, field), name) for field in costs.values()]
        return (judged, *scores, *ratios)

    return Matrix(tuple(columns), tuple((name, row(name)) for name in c.contenders))


def _ratio(x: float, name: str) -> Cell:
    return Cell(f"{x:.2f}", "", x, "good" if x < 0.95 and name != PLAIN else "")


def _score(c: Results, r: Result | None, task: str, word: str) -> Cell:
    unit = c.tasks[task]["unit"]
    if r is None:
        return Cell("refused", tone="quiet")
    if r.gap is None:
        return Cell(number(r.score, unit), f"{r.prompts} prompts", 0.0, "quiet")
    if word == "inactive":
        return Cell("as unedited", "", 0.0, "quiet")
    mean, low, high = (number(x, unit, signed=True) for x in (r.gap.mean, r.gap.low, r.gap.high))
    tone = {"better": "good", "worse": "bad"}.get(c.verdicts.get((task, r.contender), ""), "")
    return Cell(mean, f"{low} to {high}", r.gap.mean, tone)
