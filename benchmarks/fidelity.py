"""What each formula was read against by somebody who had not written it; the record is written by hand, row by row."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from benchmarks.speed.timing import RECORDS
from heedful.catalogue import entries
from heedful.functions import functions

WHOSE = {
    "theirs": "the authors' code or text",
    "others": "others' accounts or code",
    "none": "no more than the abstract, or less",
}
ABOUT = """# What each formula was read against

Files of methods, and what they say under "Unlike the authors", were read line by line by somebody who had not written
them, against the authors' own code or text where these could be had ({date}). A row says what was looked at, once and
by one reader: not that nothing was missed. What was found wrong was mended, with a test, and the change log names it.
Papers that are not here were read in an earlier round, of which no such list was kept.

Of {rows} rows {counts}. Beside {run} the authors' own functions were run, on the same numbers.
"""


def page() -> str:
    """The docs page."""
    told = json.loads((RECORDS / "fidelity.json").read_text(encoding="utf-8"))
    of: list[Any] = [*entries().values(), *functions().values()]
    links = {paper.key: f"[{paper.key}]({paper.link})" for one in of if one.paper for paper in one.paper.every}
    found = Counter(row["whose"] for row in told["rows"])
    counts = ", ".join(f"{found[whose]} rest on {said}" for whose, said in WHOSE.items())
    run = sum(row["run"] for row in told["rows"])
    rows = [ABOUT.format(date=told["date"], rows=len(told["rows"]), counts=counts, run=run)]
    rows += ["| paper | method | what was read | which is | run beside ours |", "|---|---|---|---|---|"]
    for row in told["rows"]:
        paper, beside = links.get(row["paper"], row["paper"]), "yes" if row["run"] else ""
        rows.append(f"| {paper} | {row['name']} | {row['read']} | {WHOSE[row['whose']]} | {beside} |")
    return "\n".join(rows) + "\n"
