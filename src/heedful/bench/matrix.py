"""Methods by tasks and costs at one glance, and one verdict for each method."""

from __future__ import annotations

from heedful.bench.advice import SAVED, WORDS, front
from heedful.bench.memory import largest
from heedful.bench.numbers import direction, number, size, task_name, units
from heedful.bench.results import PLAIN, Price, Result, Results
from heedful.core.figures import Cell, Matrix

VERDICTS = {
    "helps": ("surely better on some task, and safe on every other that it can be asked", "good"),
    "safe": ("surely no worse than by the margin on any task", "good"),
    "unclear": ("no interval is short enough yet, or no task tells; more prompts or minutes may decide", ""),
    "harms": ("surely worse on some task, and by more than the margin on average", "bad"),
    "inactive": ("changed nothing here", "quiet"),
    "refused": ("could not be asked", "quiet"),
}


def matrix(c: Results) -> Matrix:
    """A row for each method, a column for each task and cost; the unedited model first."""
    tasks = [task for task in c.tasks if any(r.task == task for r in c.results)]
    costs = max((list(p.ratios) for p in c.prices), key=len, default=[])
    columns = [("verdict", "")]
    for task in tasks:
        about = c.tasks[task]
        columns.append((task_name(c, task), f"{units(about['unit'])}, {direction(about)} is better"))
    columns += [(name, "× baseline") for name in costs]
    if c.limit is not None:
        columns.append((f"batch in {size(c.limit)}", "largest tried whose cache fits"))
    best = {cost: front(c, cost) for cost in WORDS}
    found = {(r.contender, r.task): r for r in c.results}
    prices = {p.contender: p for p in c.prices}

    def row(name: str) -> tuple[Cell, ...]:
        word = "" if name == PLAIN else c.verdict(name)
        judged = Cell(word, "", float(list(VERDICTS).index(word)), VERDICTS[word][1]) if word else Cell("", "", -1.0)
        scores = [_score(c, found.get((name, task)), task, name) for task in tasks]
        price = prices.get(name) if word != "inactive" else None
        ratios = [_ratio(price, cost, name in best.get(cost, ())) for cost in costs]
        return (judged, *scores, *ratios, *_room(c, name))

    return Matrix(tuple(columns), tuple((name, row(name)) for name in c.contenders))


def _room(c: Results, name: str) -> list[Cell]:
    """The largest batch that the limit has room for; nothing where there is no limit."""
    sizes = {rows: p.cache for rows in c.batches for p in c.priced[rows] if p.contender == name}
    if c.limit is None or not sizes:
        return [] if c.limit is None else [Cell("")]
    rows = largest(c, name)
    if rows is None:
        return [Cell("none", f"{size(min(sizes.values()))} at {min(sizes)}", 0.0, "bad")]
    return [Cell(str(rows), size(sizes[rows]), float(rows), "good" if rows == max(c.batches) else "")]


def _ratio(price: Price | None, cost: str, best: bool) -> Cell:
    """A cost with the ends that are known of it; less is good where all of that is less."""
    if price is None or (ratio := price.ratios.get(cost)) is None:
        return Cell("")
    told = [f"{ratio.low:.2f} to {ratio.high:.2f}"] * (ratio.low < ratio.high) + ["on the front"] * best
    tone = "good" if ratio.high < SAVED and price.contender != PLAIN else ""
    return Cell(f"{ratio.median:.2f}", ", ".join(told), ratio.median, tone)


def _score(c: Results, r: Result | None, task: str, name: str) -> Cell:
    unit = c.tasks[task]["unit"]
    if r is None:
        refused = any((known.task, known.contender) == (task, name) for known in c.refused)
        return Cell("refused" if refused else "not asked", tone="quiet")
    if r.gap is None:
        return Cell(number(r.score, unit), f"{r.prompts} prompts", 0.0, "quiet")
    if (task, name) in c.idle:
        return Cell("as unedited", "", 0.0, "quiet")
    mean, low, high = (number(x, unit, signed=True) for x in (r.gap.mean, r.gap.low, r.gap.high))
    tone = {"better": "good", "safe": "good", "worse": "bad"}.get(c.verdicts.get((task, name), ""), "")
    within = f"{low} to {high}" if (low, high) != ("?", "?") else "no interval yet"
    return Cell(mean, f"{within}, n = {r.prompts}", r.gap.mean, tone)
