"""The record of the mutants, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "records" / "mutants.json"
EQUIVALENT = Path(__file__).with_name("equivalent.json")  # changes that no test can tell from the original, and why
BAR = 0.95


class Survivor(TypedDict):
    line: int
    change: str


class Row(TypedDict):
    """What was found for one file."""

    state: str  # of the file and its tests
    made: int
    caught: int
    survivors: list[Survivor]


def page() -> str:
    """Per file that has something to change, caught and made, and the survivors by line."""
    every: dict[str, Row] = json.loads(RECORD.read_text())
    record = {name: row for name, row in every.items() if row["made"]}
    bare = len(every) - len(record)
    made, caught = (sum(row[key] for row in record.values()) for key in ("made", "caught"))  # type: ignore[literal-required]
    below = [name for name, row in record.items() if row["caught"] < BAR * row["made"]]
    equal = sum(map(len, json.loads(EQUIVALENT.read_text()).values()))
    lines = [
        "# Mutants: do a method's own tests see a changed formula?\n",
        "`make mutants` changes one sign, axis, constant, comparison, norm or reduction of a file of `methods/` or of "
        "`explaining/` at a time and asks that file's own tests and the laws; of what several share, in `kit/`, in "
        "`_*.py` beside methods or beside the verbs in `explaining/`, its tests and those of all that use it. "
        f"{caught} of {made} changes in {len(record)} files were caught, and {bare} have nothing to change; "
        + (f"below {BAR:.0%}: {', '.join(below)}. " if below else f"no file is below {BAR:.0%}. ")
        + f"{equal} changes that no test could tell from the original are left out, with the reason, in "
        "`benchmarks/mutants/equivalent.json`.\n",
        "| file | caught | survivors |",
        "|---|---|---|",
    ]
    for name, row in sorted(record.items()):
        told = "<br>".join(
            f"line {one['line']}: `{one['change'].replace('|', chr(92) + '|')}`" for one in row["survivors"]
        )
        lines.append(f"| {name} | {row['caught']} of {row['made']} | {told} |")
    return "\n".join(lines) + "\n"
