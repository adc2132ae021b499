"""docs/coverage.md, from the records."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

from . import libraries_page
from .rows import FOUND, HEADS, RAN, STATUSES, Row, counted, outside, through, told

WORDS = {
    "served": "every attention layer that the input reached ran under heedful, and every check above held",
    "served in part": "the same for the part that the refusal named; some modules compute attention by themselves",
    "refused": "`attach` or the forward raised, with the reason",
    "wrong": "a check failed",
    "no attention": "no module of the model calls itself attention, and none makes a map",
    "cannot build": "no tiny model, or no input that it takes natively: evidence neither for nor against",
}
COLUMNS = ["class", "status", "layers", "eager", "sdpa", "heads"]
OF_HEADS = {
    "fine": "what is learned for each head has the sizes of the calls, and moves logits",
    "refused": "a layer does not tell its sizes; `.on(layers=...)` leaves it out, and what learns nothing acts there",
    "not reached": "the input reached no layer, or no edit of any kind moves what can be compared",
    "wrong": "the sizes were others, or logits did not move",
}
CHECKS = """Each class that transformers' auto mappings name, but for those whose attention is all outside its interface
([below](#outside-the-interface)), is built tiny, with random weights under which attention matters, and run on a batch
with padding where it takes text; an encoder of timm's is as timm makes it:

1. a stack that changes nothing, computed by the reference backend: logits equal those of the model's own eager
   attention bit for bit, those of its own sdpa within the budget of `conformance/tolerances.py`
2. a reader of every pattern, in tiles: logits within the budget
3. a stack that acts nowhere: logits equal bit for bit, whatever implementation the model had, but for models that
   look at its name and build another mask for names they do not know: those within the budget
4. one head's pattern set to zero, one head's output set to zero, the output of every head by what is learned for
   it, as large as the layer's sizes say: logits move; of the last the tables have a word of its own under *heads*
5. after the run: logits as before bit for bit, and every config as it was
6. where the class generates: four tokens from a left-padded batch under 1, logits of each step as in 1"""


def page() -> str:
    """The whole page."""
    rows = [row for row in told()["classes"] if not row.get("outside")]
    parts = [
        "# Which models heedful serves", _measured(told()["classes"]), CHECKS,
        _words(WORDS), "Under *heads*:", _words(OF_HEADS), _told_of(through()), _told_of_heads(told()["classes"]),
        "## By group", _groups(rows), "## Refused and served in part, by reason", _reasons(rows),
        "## Nothing learned for each head, by reason", _unlearned(told()["classes"]),
        "## Not built", _unbuilt(rows), "## Every class", _classes(rows), *_outside(), libraries_page.section(table),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _measured(rows: Sequence[Row]) -> str:
    dates = sorted({row["date"] for row in rows})
    releases = collections.Counter(f"transformers {row['transformers']} and torch {row['torch']}" for row in rows)
    made = "; ".join(f"{count:,} classes with {name}" for name, count in sorted(releases.items()))
    when = f"on {dates[0]}" if len(dates) == 1 else f"between {dates[0]} and {dates[-1]}"
    return f"Measured by `python -m benchmarks.coverage.serve` {when}, in float32: {made}."


def _told_of(rows: Sequence[Row]) -> str:
    exact = sum(row.get("eager") == 0 for row in rows)
    far = ", ".join(f"{row['class']} {row['eager']:g}" for row in rows if row.get("eager"))
    writes = [row["generate"] for row in rows if "generate" in row]
    also = "; the others within the budget, in roundings of the largest logit: " if far else ""
    parts = [
        f"Of {len(rows)} classes that go through the interface, {counted(rows)} {exact} equal eager attention bit for "
        f"bit{also}{far}."
    ]
    if writes:
        exactly = sum(x == 0 for x in writes)
        parts.append(f"Of {len(writes)} that generate, {exactly} do so bit for bit and the others within the budget.")
    return " ".join([*parts, *_unseen(rows)])


def _unseen(rows: Sequence[Row]) -> list[str]:
    unseen = [row["class"] for row in rows if row.get("unseen")]
    said = "In these no edit can be seen, also not with all attention replaced by zeros, so check 4 says nothing: "
    return [f"{said}{', '.join(unseen)}."] if unseen else []


def _words(meanings: Mapping[str, str]) -> str:
    return "\n".join(f"- **{word}**: {meaning}" for word, meaning in meanings.items())


def _heads(row: Row) -> str:
    """A row's word for what is learned for each head; none where nothing of the class runs under heedful."""
    if row["status"] in RAN and row.get("heads") not in HEADS:
        raise ValueError(
            f"the row of {row['class']} has no word for what is learned for each head; measure it with "
            "`python -m benchmarks.coverage.serve --heads`"
        )
    return str(row.get("heads", ""))


def _told_of_heads(rows: Sequence[Row]) -> str:
    count = collections.Counter(filter(None, map(_heads, rows)))
    said = ", ".join(f"{count[word]} {word}" for word in HEADS)
    return f"Of {count.total()} classes that run under heedful, within the interface or outside, under *heads*: {said}."


def _unlearned(rows: Sequence[Row]) -> str:
    """Why, each reason once, without the name of the layer that stands before its class."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        if _heads(row) == "refused":
            found[re.sub(r"\S+ \((\w+)\)", r"\1", row["heads_reason"], count=1)].append(row["class"])
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return table(["reason", "classes"], [[why, ", ".join(names)] for why, names in ordered])


def _groups(rows: Sequence[Row]) -> str:
    groups = [group for group, _ in collections.Counter(row["group"] for row in rows).most_common()]
    lines = []
    for name in ("all", *groups):
        count = collections.Counter(row["status"] for row in rows if name in ("all", row["group"]))
        lines.append([name, count.total(), *(count[status] for status in STATUSES)])
    return table(["group", "classes", *STATUSES], lines)


def _reasons(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for row in rows:
        if row["status"] in FOUND[1:]:
            own = f"these compute attention by themselves: {', '.join(row.get('own', ()))}"
            found[row["status"], own if row.get("own") else row["reason"]].append(row["class"])
    ordered = sorted(found.items(), key=lambda item: (STATUSES.index(item[0][0]), -len(item[1])))
    return table(["status", "reason", "classes"], [[s, why, ", ".join(names)] for (s, why), names in ordered])


def _unbuilt(rows: Sequence[Row]) -> str:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        if row["status"] == "cannot build":
            found[row["reason"]].append(row["class"])
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return table(["reason", "classes"], [[why, ", ".join(names)] for why, names in ordered])


def _classes(rows: Sequence[Row]) -> str:
    return (
        "Layers: attention layers that the input reached, of those served. Eager, sdpa: largest difference under a "
        "stack that changes nothing, in float32 roundings of the largest logit.\n\n"
        + table(COLUMNS, [_cells(row) for row in rows])
    )


def _cells(row: Row) -> list[str]:
    layers = "{}/{}".format(*row["layers"]) if "layers" in row else ""
    far = (f"{row[m]:g}" if m in row else "" for m in ("eager", "sdpa"))
    return [row["class"], row["status"], layers, *far, _heads(row)]


def _outside() -> list[str]:
    rows = outside()
    writes = [row["generate"] for row in rows if "generate" in row]
    return [
        "## Outside the interface",
        f"Of {len(rows)} more whose attention is all outside it, {counted(rows)} They call torch's attention, or write "
        "it out: a product, a softmax, a product, which are followed ([vision.md](vision.md)). Measured as above: "
        f"{sum(row.get('eager') == 0 for row in rows)} equal eager attention bit for bit, and of {len(writes)} that "
        f"generate {sum(x == 0 for x in writes)}; the others lie within the budget. {' '.join(_unseen(rows))}".rstrip(),
        table(
            [*COLUMNS, "reason"],
            [[*_cells(row), row.get("reason", "")] for row in rows],
        ),
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
