"""What a sweep found of classes that go through transformers' interface, for readers and for programs."""

from __future__ import annotations

import collections
import datetime as dt
import json
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from . import outside
from .outside import Record, roundings, table

ROOT = Path(__file__).resolve().parents[2]
STATUSES = ("served", "served in part", "refused", "wrong", "no attention", "cannot build")
WORDS = {
    "served": "every attention layer that the input reached ran under heedful, and every check below held",
    "served in part": "the same for the part that the refusal named; some modules compute attention by themselves",
    "refused": "`attach` or the forward raised, with the reason",
    "wrong": "a check failed",
    "no attention": "no module of the model calls itself attention, and none makes a map",
    "cannot build": "no tiny model, or no input that it takes natively: evidence neither for nor against",
}


def write(records: Sequence[Record]) -> list[Path]:
    """Both files; those that write attention out stand in a section of their own."""
    records = [r for r in records if not outside.is_one(r)]
    facts = _facts(records)
    page, data = ROOT / "docs" / "coverage.md", ROOT / "benchmarks" / "coverage" / "coverage.json"
    _, mark, others = page.read_text().partition(outside.BEGIN)
    page.write_text(_page(records, facts) + f"\n{mark}{others}")
    data.write_text(json.dumps(facts, indent=1) + "\n")
    return [page, data]


def _facts(records: Sequence[Record]) -> Record:
    through = [r for r in records if r.get("through")]
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "hardware": _processor(),
        "classes": len(records),
        "statuses": _count(r["status"] for r in records),
        "model_types": _count(r["status"] for r in {(r.get("model_type"), r["status"]): r for r in records}.values()),
        "groups": {g: _count(r["status"] for r in records if r["group"] == g) for g in _order(records)},
        "through_interface": _count(r["status"] for r in through),
        "through_interface_served": round(_share(through), 4),
        "sentence": _sentence(through),
        "bitwise_eager": sum(roundings(r, "eager") == 0 for r in through),
        "not_bitwise_eager": {r["class"]: roundings(r, "eager") for r in through if roundings(r, "eager")},
        "generate_bitwise": sum(r.get("generate", {}).get("roundings") == 0 for r in through),
        "generate_within_budget": sum(bool(r.get("generate", {}).get("roundings")) for r in through),
        "not_bitwise_left_alone": sorted(
            r["class"] for r in through if any("idle" in r.get(m, {}) for m in ("eager", "sdpa"))
        ),
        "unseen": sorted(r["class"] for r in through if any(r.get(m, {}).get("unseen") for m in ("eager", "sdpa"))),
        "by_class": {r["class"]: r["status"] for r in sorted(records, key=lambda r: r["class"])},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _count(statuses: Iterable[str]) -> dict[str, int]:
    found = collections.Counter(statuses)
    return {s: found[s] for s in STATUSES if found[s]}


def _share(through: Sequence[Record]) -> float:
    return sum(r["status"].startswith("served") for r in through) / max(1, len(through))


def _sentence(through: Sequence[Record]) -> str:
    found = outside.counted(r["status"] for r in through)
    return f"Of {len(through)} classes that go through transformers' attention interface, {found}"


def _order(records: Sequence[Record]) -> list[str]:
    sizes = collections.Counter(r["group"] for r in records)
    return [group for group, _ in sizes.most_common()]


def _page(records: Sequence[Record], facts: Record) -> str:
    made = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    parts = [
        "# Which models heedful serves",
        f"Measured by `python -m benchmarks.coverage.serve` on {facts['date']} with {made}, on {facts['hardware']}, in "
        "float32. Generated; do not edit.",
        "Each class that transformers' auto mappings name, but for those whose attention is all outside its interface "
        "([below](#outside-the-interface)), is built tiny, with random weights under which attention "
        "matters, and run on a batch with padding where it takes text:\n\n"
        "1. a stack that changes nothing, computed by the reference backend: logits equal those of the model's own "
        "eager attention bit for bit, those of its own sdpa within the budget of `conformance/tolerances.py`\n"
        "2. a reader of every pattern, in tiles: logits within the budget\n"
        "3. a stack that acts nowhere: logits equal bit for bit, whatever implementation the model had, but for models "
        "that look at its name and build another mask for names they do not know: those within the budget\n"
        "4. one head's pattern set to zero, one head's output set to zero: logits move\n"
        "5. after the run: logits as before bit for bit, and every config as it was\n"
        "6. where the class generates: four tokens from a left-padded batch under 1, logits of each step as in 1",
        "\n".join(f"- **{status}**: {meaning}" for status, meaning in WORDS.items()),
        f"{facts['sentence']} {facts['bitwise_eager']} equal eager attention bit for bit"
        + (
            "; the others within the budget, in roundings of the largest logit: "
            + ", ".join(f"{k} {v}" for k, v in facts["not_bitwise_eager"].items())
            if facts["not_bitwise_eager"]
            else ""
        )
        + f". Of {facts['generate_bitwise'] + facts['generate_within_budget']} that generate, "
        f"{facts['generate_bitwise']} do so bit for bit and the others within the budget.",
    ]
    if facts["unseen"]:
        parts.append(
            "In these no edit can be seen, also not with all attention replaced by zeros, so check 4 says nothing: "
            + ", ".join(facts["unseen"])
            + "."
        )
    parts += ["## By group", _groups(facts), "## Refused and served in part, by reason", _reasons(records)]
    parts += ["## Not built", _unbuilt(records), "## Every class", _classes(records)]
    return "\n\n".join(parts) + "\n"


def _groups(facts: Record) -> str:
    rows = [[g, sum(c.values()), *(c.get(s, 0) for s in STATUSES)] for g, c in facts["groups"].items()]
    return table(
        ["group", "classes", *STATUSES],
        [["all", facts["classes"], *(facts["statuses"].get(s, 0) for s in STATUSES)], *rows],
    )


def _reasons(records: Sequence[Record]) -> str:
    found: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for record in records:
        if record["status"] in ("served in part", "refused", "wrong"):
            if record.get("own"):
                why = f"these compute attention by themselves: {', '.join(record['own'])}"
            else:
                why = record["reason"].replace("|", "/")
            found[record["status"], why].append(record["class"])
    rows = sorted(found.items(), key=lambda item: (STATUSES.index(item[0][0]), -len(item[1])))
    return table(["status", "reason", "classes"], [[s, why, ", ".join(names)] for (s, why), names in rows])


def _unbuilt(records: Sequence[Record]) -> str:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for record in records:
        if record["status"] == "cannot build":
            found[record["reason"][:160].replace("|", "/")].append(record["class"])
    rows = sorted(found.items(), key=lambda item: -len(item[1]))
    return table(["reason", "classes"], [[why, ", ".join(names)] for why, names in rows])


def _classes(records: Sequence[Record]) -> str:
    rows = []
    for record in sorted(records, key=lambda r: r["class"]):
        eager = record.get("eager", {})
        layers = f"{eager['entered']}/{eager['layers']}" if eager else ""
        far = ["" if (x := roundings(record, mode)) is None else f"{x:g}" for mode in ("eager", "sdpa")]
        rows.append([record["class"], record["status"], layers, *far])
    return (
        "Layers: attention layers that the input reached, of those served. Eager, sdpa: largest difference under a "
        "stack that changes nothing, in float32 roundings of the largest logit.\n\n"
        + table(["class", "status", "layers", "eager", "sdpa"], rows)
    )
