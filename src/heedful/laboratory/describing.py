"""A lab in words, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from heedful.bench.describing import aligned
from heedful.core.figures import Cell, Curves, Description, Figure, Finding, Intervals, Listing, Matrix, Scatter
from heedful.laboratory.costs import PLAIN, RATIO, TRAIN
from heedful.laboratory.course import Course, Quantity
from heedful.laboratory.differences import ENOUGH, Difference
from heedful.laboratory.results import Found, Results

POINTS = 40  # of a learning curve


def _way(quantity: Quantity) -> str:
    if quantity.more_is_better is None:
        return quantity.unit
    return f"{quantity.unit}, {'more' if quantity.more_is_better else 'less'} is better"


def matrix(lab: Results) -> Matrix:
    """A row for each mechanism, a column for each quantity; softmax first."""
    columns = [(q.name, _way(q)) for course in lab.courses for q in lab.quantities(course)]

    def row(name: str) -> tuple[Cell, ...]:
        return tuple(
            _cell(lab.found.get((name, course.name, q.name)), q)
            for course in lab.courses
            for q in lab.quantities(course)
        )

    return Matrix(tuple(columns), tuple((name, row(name)) for name in lab.contenders))


def _cell(found: Found | None, quantity: Quantity) -> Cell:
    if found is None:
        return Cell("-", tone="quiet")
    text = written(found.mean, quantity)
    if found.gap is None:
        return Cell(text, "", found.mean)
    gap, tone = found.gap, ""
    if gap.sure and quantity.more_is_better is not None:
        tone = "good" if (gap.mean > 0) == quantity.more_is_better else "bad"
    return Cell(text, f"{gap.mean:+.3f}: {gap.low:+.3f} to {gap.high:+.3f}", found.mean, tone)


def written(x: float, quantity: Quantity) -> str:
    """A number as people write it."""
    return f"{x:z.2f}" if quantity.unit == RATIO or abs(x) >= 10 else f"{x:z.3f}"  # z: no zero below zero


def findings(lab: Results) -> Iterable[Finding]:
    """What a reader would want to know, one sentence each."""
    for course in lab.courses:
        first = course.quantities[0]
        mine = [r for r in lab.results if (r.course, r.quantity) == (course.name, first.name)]
        if len(mine) < 2:
            continue
        ranked = sorted(mine, key=lambda r: r.mean, reverse=bool(first.more_is_better))
        named = ", ".join(f"{r.mechanism} {written(r.mean, first)}" for r in ranked)
        yield Finding(f"{course.name.capitalize()}, {first.name} ({first.unit}), the best first: {named}.", 1.0)
    seeds = int(lab.facts.get("seeds", 0))
    if seeds < ENOUGH:
        told = f"{seeds} seed{'' if seeds == 1 else 's'}"
        yield Finding(f"With {told} no difference is called sure; it takes {ENOUGH}.", 0.8)
    if lab.inactive:
        yield Finding(f"Changed nothing here, and are softmax: {', '.join(lab.inactive)}.", 0.9)
    for refused in lab.refused:
        yield Finding(f"{refused.mechanism} was refused by {refused.course}: {refused.reason}", 0.4)


def figures(lab: Results) -> Iterable[Figure]:
    for course in lab.courses:
        yield from _differences(lab, course)
        yield from _worth(lab, course)
        means = {
            name: {q.name: lab.found[name, course.name, q.name].mean for q in course.quantities
                   if (name, course.name, q.name) in lab.found}
            for name in lab.contenders
        }  # fmt: skip
        yield from course.curves({name: of for name, of in means.items() if of})
        yield from _learning(lab, course)
        yield _table(lab, course)


def _differences(lab: Results, course: Course) -> Iterable[Figure]:
    """Intervals of all quantities that share a unit and a way."""
    names = lab.contenders[1:]
    groups: dict[tuple[str, str], dict[str, Tensor]] = {}
    for q in course.quantities:
        by = [lab.found.get((name, course.name, q.name)) for name in names]
        if q.more_is_better is not None and any(r is not None and r.gap is not None for r in by):
            rows = torch.tensor([_three(None if r is None else r.gap) for r in by])
            groups.setdefault((q.unit, "more" if q.more_is_better else "less"), {})[q.name] = rows
    for place, ((unit, way), found) in enumerate(groups.items()):
        yield Intervals(
            f"{course.name}_differences" + (f"_{place}" if place else ""),
            f"{course.name.capitalize()}: difference to softmax, in {unit}",
            f"Each mechanism against softmax of the same seeds, with the 95% interval over seeds; {way} is better.",
            names, found, f"difference, {unit}", unit, PLAIN,
        )  # fmt: skip


def _three(gap: Difference | None) -> list[float]:
    return [math.nan] * 3 if gap is None else [gap.mean, gap.low, gap.high]


def _worth(lab: Results, course: Course) -> Iterable[Figure]:
    """The first quantity against the time of training."""
    first = course.quantities[0]
    sign = 1 if first.more_is_better else -1
    points = {}
    for name in lab.contenders:
        worth, time = (lab.found.get((name, course.name, key)) for key in (first.name, TRAIN))
        if worth is not None and time is not None:
            y = sign * worth.mean
            low, high = (0.0, 0.0) if worth.gap is None else (worth.gap.low, worth.gap.high)
            off = sorted(sign * (x - (0.0 if worth.gap is None else worth.gap.mean)) for x in (low, high))
            points[name] = time.mean, y, y + off[0], y + off[1]
    if len(points) > 1:
        unit = f"{'' if sign > 0 else '-'}{first.name}, {first.unit}"
        yield Scatter(
            f"{course.name}_worth", f"{course.name.capitalize()}: {first.name} against the time of training",
            "Up is better, left is cheaper; the line joins those that none beats in both.",
            points, "time of a training step, × softmax", unit,
        )  # fmt: skip


def _learning(lab: Results, course: Course) -> Iterable[Figure]:
    """The loss of training, averaged over seeds and neighbouring steps."""
    lines: dict[str, Tensor] = {}
    many = min(POINTS, course.steps)
    for name in lab.contenders:
        runs = [r.losses for r in lab.of(name, course.name).values() if len(r.losses) == course.steps]
        if runs:
            mean = torch.tensor(runs).mean(0)
            lines[name] = torch.stack([part.mean() for part in mean.tensor_split(many)])
    ends = torch.arange(course.steps).tensor_split(many)
    x = [course.a_batch * (int(part[-1]) + 1) for part in ends]
    if lines:
        what = "The loss of training batches, the mean over seeds and neighbouring steps."
        title = f"{course.name.capitalize()}: learning"
        yield Curves(f"{course.name}_learning", title, what, x, lines, "tokens seen", "loss")


def _table(lab: Results, course: Course) -> Listing:
    quantities = lab.quantities(course)
    rows = []
    for name in lab.contenders:
        mine = lab.of(name, course.name)
        if mine:
            found = [lab.found.get((name, course.name, q.name)) for q in quantities]
            cells = [None if r is None else written(r.mean, q) for r, q in zip(found, quantities, strict=True)]
            rows.append((name, *cells, next(iter(mine.values())).parameters))
    about = " ".join(f"{q.name}: {q.about[0].lower()}{q.about[1:]}" for q in quantities if q.about)
    return Listing(
        f"{course.name}_table", course.name.capitalize(),
        f"{course.about} {course.tokens:,} tokens of training; means over seeds. {about}",
        ("mechanism", *(q.name for q in quantities), "parameters"), rows,
    )  # fmt: skip


def description(lab: Results) -> Description:
    found = sorted(findings(lab), key=lambda f: -f.weight)
    return Description(figures=tuple(figures(lab)), findings=tuple(found))


def in_words(lab: Results, told: Description) -> str:
    """The lab as a text: sentences, then for each course its numbers and the differences of what counts most."""
    out = [f"- {finding.text}" for finding in told.findings]
    for course in lab.courses:
        table = _table(lab, course)
        out += ["", f"{table.title}. {table.what}", *aligned(table)]
        first = course.quantities[0]
        gaps = [r for r in lab.results if (r.course, r.quantity) == (course.name, first.name) and r.gap is not None]
        rows = [(r.mechanism, *(f"{x:+.3f}" for x in (r.gap.mean, r.gap.low, r.gap.high))) for r in gaps if r.gap]
        if rows:
            title = f"{first.name}, difference to softmax in {first.unit}, with the 95% interval over seeds"
            out += ["", title, *aligned(Listing("", "", "", ("mechanism", "mean", "low", "high"), rows))]
    return "\n".join(out)
