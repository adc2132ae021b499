"""A comparison in words, tables and figures."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch

from heedful.bench.advice import SAVED, advice, holding
from heedful.bench.intervals import Gap
from heedful.bench.matrix import VERDICTS
from heedful.bench.memory import by_batch, within
from heedful.bench.numbers import MB, direction, margin, number, rounded, task_name, units
from heedful.bench.records import Answered
from heedful.bench.results import PLAIN, POINTS, Price, Result, Results
from heedful.bench.worst import listing, sentence
from heedful.core.figures import (
    Description,
    Figure,
    Finding,
    Intervals,
    Listing,
    Matrix,
    Scatter,
    a_few,
    counted,
    percent,
)


def findings(c: Results) -> Iterable[Finding]:
    """What a reader would want to know, one sentence each."""
    prices = {p.contender: p for p in c.prices}
    plain = {r.task: r for r in c.results if r.contender == PLAIN}
    for name in c.contenders[1:]:
        mine = [r for r in c.results if r.contender == name]
        if not mine:
            continue
        if name in c.inactive:
            why = c.reason(name) or "longer prompts, or a stronger setting, may show what it does"
            yield Finding(f"{name} changed nothing: {why}.", 0.3)
            continue
        told = [
            _clause(word, [r for r in mine if c.verdicts.get((r.task, name)) == word], plain, c)
            for word in ("better", "worse")
        ]
        told = [clause for clause in told if clause]
        cheap = _saves(prices.get(name))
        if told or cheap:
            known = "; it ".join([cheap] * bool(cheap) + (told or [f"is {LONG[c.verdict(name)]}"]))
            yield Finding(f"{name} {known}.", 0.8 if told else 0.5)
    if c.results:
        yield Finding(_lead(c), 1.0)
    asked = {r.contender for r in c.results} | {r.contender for r in c.refused}
    if waiting := [name for name in c.contenders[1:] if name not in asked]:
        yield Finding(f"Not asked before the end: {', '.join(waiting)}.", 0.98)
    for text in (*within(c), *advice(c)):
        yield Finding(text, 0.95)
    if text := sentence(c):
        yield Finding(text, 0.9)
    for task in c.blind:
        score = number(plain[task].score, c.tasks[task]["unit"])
        yield Finding(
            f"{task_name(c, task)} tells nothing: the unedited model gets {score}, no more than guessing by the "
            "margin, so that no loss can show there.", 0.9,
        )  # fmt: skip
    for task, about in c.tasks.items():
        for said in about.get("told", ()):
            yield Finding(f"{task_name(c, task)}: {said}.", 0.85)
        if out := about.get("left_out"):
            yield Finding(f"{task_name(c, task)}: {len(out)} left out: {a_few(out)}.", 0.85)
    refused: dict[tuple[str, str], list[str]] = {}
    for one in c.refused:
        refused.setdefault((one.contender, one.reason), []).append(_where(c, one.task))
    for (name, reason), where in refused.items():
        yield Finding(f"{name} was refused {_and(where)}: {reason}", 0.4)


def _where(c: Results, task: str) -> str:
    """At what a contender was refused: a task, or costs."""
    return f"on {task_name(c, task)}" if task in c.tasks else f"when {task} were measured"


def _and(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


FOLLOWS = ("token, ms", "token ×", "cache, MB", "cache ×")  # costs of the tokens that follow a prompt
LONG = {
    "safe": "no worse than by the margin on any task",
    "unclear": "not decided yet",
    "refused": "not decided",
    "helps": "better on some task",
    "harms": "worse on some task",
}


def _lead(c: Results) -> str:
    """How many methods help, are safe, harm, and are not decided."""
    answered = {r.contender for r in c.results}
    words = [c.verdict(name) for name in c.contenders[1:] if name in answered]
    words = [word for word in words if word != "refused"]
    if not words:
        return "None of the methods could be asked."
    many = {word: words.count(word) or "none" for word in ("helps", "safe", "harms", "unclear", "inactive")}
    least, most = (end(r.prompts for r in c.results) for end in (min, max))
    asked = f"{least} to {most}" if least < most else str(most)
    held = "1 interval holds" if c.compared == 1 else f"{c.compared} intervals hold"
    return (
        f"Of {counted(len(words), 'method')}, {many['helps']} helped, {many['safe']} safe within {margin(c)}, "
        f"{many['harms']} harmful, {many['unclear']} undecided and {many['inactive']} without effect, on {asked} "
        f"prompts a task; {held} at once, at whatever prompt asking stops, with 95%."
    )


def _clause(word: str, results: list[Result], plain: dict[str, Result], c: Results) -> str:
    told = []
    for r in results:
        score, before = (number(x, c.tasks[r.task]["unit"]) for x in (r.score, plain[r.task].score))
        told.append(f"{task_name(c, r.task)} ({score}, unedited {before})")
    return f"is {word} on {_and(told)}" if told else ""


def _saves(price: Price | None) -> str:
    if price is None:
        return ""
    verbs = {"cache": "keeps", "pairs": "computes"}
    saved = {cost: x.median for cost, x in price.ratios.items() if cost in verbs and x.high < SAVED}
    return " and ".join(f"{verbs[cost]} {percent(x)} of the {cost}" for cost, x in saved.items())


def figures(c: Results) -> Iterable[Figure]:
    names = c.contenders[1:]
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for task, about in c.tasks.items():
        by = {r.contender: r for r in c.results if r.task == task and r.gap is not None}
        if by:
            rows = [_three(by[n].gap if n in by else None, 100 if about["unit"] in POINTS else 1) for n in names]
            groups.setdefault((units(about["unit"]), direction(about)), {})[task_name(c, task)] = torch.tensor(rows)
    for place, ((unit, way), found) in enumerate(groups.items()):
        yield Intervals(
            f"differences_{place}" if place else "differences",
            f"Difference to the baseline, in {unit}",
            f"Each method against the baseline, the unedited model, on the same prompts; {way} is better. All "
            "intervals of the comparison hold at once with 95%, at whatever prompt asking stops: one on one side of "
            "zero is sure.",
            names, found, f"difference, {unit}", unit, PLAIN,
        )  # fmt: skip
    yield from _clouds(c)
    for task, about in c.tasks.items():
        mine = [r for r in c.results if r.task == task]
        if mine:
            chance = _chance(c, task)
            guess = "" if chance is None else f" Guessing scores {number(chance, about['unit'])}."
            yield Listing(
                f"task_{list(c.tasks).index(task)}",
                task_name(c, task),
                f"{about['about']} Score: {about['unit']}; {direction(about)} is better.{guess} The log-probability is "
                "that of what is right, a token.",
                ("method", "prompts", "score", "difference", "low", "high", "log-prob", "active"),
                [_row(r, about["unit"]) for r in mine],
            )
    yield from listing(c)
    prices = [p for p in c.prices if p.contender not in c.inactive]
    if prices:
        tokens, batch = prices[0].tokens, prices[0].batch
        read = "one prompt" if batch == 1 else f"a batch of {batch}, all one prompt"
        left = f" Left out, since they changed nothing: {', '.join(c.inactive)}." if c.inactive else ""
        yield Listing(
            "costs",
            "What each costs",
            f"Measured on {read} of {tokens} tokens, in {counted(prices[0].turns, 'timing repeat')}, each beside "
            f"one of the baseline; ratios are to it. Memory is what prefill takes above the resting model.{left}",
            *_filled(
                ("method", "prefill, s", "prefill ×", *FOLLOWS, "peak, MB", "pairs"), [_cost_row(p) for p in prices]
            ),
        )
    if len(c.batches) > 1:
        yield from by_batch(c)


def _chance(c: Results, task: str) -> float | None:
    found = [r.chance for r in c.records if isinstance(r, Answered) and r.task == task and r.contender == PLAIN]
    known = [x for x in found if x is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None


def _three(gap: Gap | None, times: float) -> list[float]:
    return [math.nan] * 3 if gap is None else [times * x for x in _known(gap)]


def _row(r: Result, unit: str) -> tuple[object, ...]:
    gap: tuple[float | None, ...] = (None,) * 3
    if r.gap is not None:
        times, digits = (100, 1) if unit in POINTS else (1, 3)
        gap = tuple(rounded(times * x, digits) if math.isfinite(x) else None for x in _known(r.gap))
    return r.contender, r.prompts, number(r.score, unit), *gap, r.nats, "yes" if r.active else "no"


def _filled(
    columns: tuple[str, ...], rows: list[tuple[object, ...]]
) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """The same without the columns on tokens that follow, where none does."""
    stay = [i for i, name in enumerate(columns) if name not in FOLLOWS or any(row[i] is not None for row in rows)]
    return tuple(columns[i] for i in stay), [tuple(row[i] for i in stay) for row in rows]


def _cost_row(p: Price) -> tuple[object, ...]:
    peak = None if p.peak is None else p.peak / MB
    known = {cost: ratio.median for cost, ratio in p.ratios.items()}
    prefill, token, cache = map(known.get, ("prefill", "token", "cache"))
    pairs = percent(known["pairs"]) if "pairs" in known else None
    step, held = (None, None) if p.token is None else (1000 * p.token, p.cache / MB)
    return p.contender, p.prefill, prefill, step, token, held, cache, peak, pairs


def _clouds(c: Results) -> Iterable[Scatter]:
    """Quality against cost: what the right answers lose or win in log-probability, mean over tasks."""
    worth = c.worth
    for key, title, cost, label in (
        ("pareto", "Quality against prefill time", "prefill", "prefill time, × baseline"),
        ("pareto_cache", "Quality against cache size", "cache", "bytes of cache, × baseline"),
    ):
        prices = [p for p in c.prices if p.contender not in c.inactive]
        points = {
            p.contender: (p.ratios[cost].median, *_worth(worth.get(p.contender))) for p in prices if cost in p.ratios
        }
        points = {n: at for n, at in points.items() if n == PLAIN or (n in worth and (key == "pareto" or at[0] < 0.99))}
        joined = settings(points) if key == "pareto_cache" else []
        if len({at[0] for at in points.values()}) > 1:
            yield Scatter(
                key, title,
                "Up is better, left is cheaper; the grey line is the front of what is known to hold, beaten by nothing "
                f"of that kind in both{'; dotted ones join the settings of one method' * bool(joined)}. Quality is the "
                "mean difference of the right answer's log-probability.",
                points, label, "quality, nats a token", (PLAIN, *holding(c)), joined,
            )  # fmt: skip


def settings(points: Mapping[str, tuple[float, ...]]) -> list[list[str]]:
    """Names that are one method with other settings, in the order of cost."""
    families: dict[str, list[str]] = {}
    for name in sorted(points, key=lambda name: points[name][0]):
        families.setdefault(re.sub(r"\([^|]*\)", "", name), []).append(name)
    return [names for names in families.values() if len(names) > 1]


def _worth(gap: Gap | None) -> tuple[float, float, float]:
    return (0.0, 0.0, 0.0) if gap is None else _known(gap)


def _known(gap: Gap) -> tuple[float, float, float]:
    """Mean and ends; what few prompts leave open is not drawn."""
    low, high = (x if math.isfinite(x) else math.nan for x in (gap.low, gap.high))
    return gap.mean, low, high


def description(c: Results) -> Description:
    found = sorted(findings(c), key=lambda f: -f.weight)
    return Description(figures=tuple(figures(c)), findings=tuple(found))


def in_words(c: Results, told: Description, table: Matrix) -> str:
    """A comparison as a text: sentences, then one table for each task, then the costs."""
    out = [
        f"{c.facts.get('model', 'a model')}: {counted(len(c.contenders) - 1, 'method')}, "
        f"{counted(len(c.tasks), 'task')}",
        "",
        *_verdicts(table),
        f"The margin is {margin(c)}.",
        "",
    ]
    out += [f"- {finding.text}" for finding in told.findings]
    for figure in told.figures:
        if isinstance(figure, Listing):
            out += ["", f"{figure.title}. {figure.what}", *aligned(figure)]
    return "\n".join(out)


def _verdicts(table: Matrix) -> list[str]:
    """The matrix as a text, and what its verdicts mean."""
    names = ("method", *(name for name, _ in table.columns))
    rows = [
        (name, *(f"{cell.text} ({cell.detail})" if cell.detail else cell.text or "-" for cell in cells))
        for name, cells in table.rows
    ]
    said = dict.fromkeys(cells[0].text for _, cells in table.rows if cells[0].text)
    return [*aligned(Listing("", "", "", names, rows)), "", *(f"{word}: {VERDICTS[word][0]}." for word in said)]


def markdown(told: Description) -> list[str]:
    """Sentences and tables in Markdown."""
    out = [f"- {finding.text}" for finding in told.findings]
    for figure in told.figures:
        if isinstance(figure, Listing):
            rows = [[str(x) for x in figure.columns], *([_cell(x) for x in row] for row in figure.rows)]
            lines = ["| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in rows]
            rule = "|---|" + "---:|" * (len(figure.columns) - 1)
            out += ["", f"**{figure.title}.** {figure.what}", "", lines[0], rule, *lines[1:]]
    return out


def aligned(listing: Listing) -> list[str]:
    """A table as lines of text."""
    rows = [[str(x) for x in listing.columns], *([_cell(x) for x in row] for row in listing.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _cell(x: object) -> str:
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:.1f}" if abs(x) >= 10 else f"{rounded(x, 2):.2f}"
    return str(x)
