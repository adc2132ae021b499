"""Classes of transformers whose attention is all outside its interface: a record, and a section of docs/coverage.md."""

from __future__ import annotations

import collections
import datetime as dt
import json
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "records" / "outside.json"
BEGIN, END = "<!-- outside -->", "<!-- /outside -->"
FOUND = ("served", "served in part", "refused", "wrong")

Record = dict[str, Any]


def is_one(record: Record) -> bool:
    """Whether a record of the sweep is of such a class."""
    return record.get("through") is False and record["status"] in FOUND


def write(records: Sequence[Record]) -> list[Path]:
    """The record, and its section."""
    rows = [_row(r) for r in sorted(records, key=lambda r: str(r["class"])) if is_one(r)]
    told = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "classes": rows,
    }
    RECORD.write_text(json.dumps(told, indent=1) + "\n")
    page = ROOT / "docs" / "coverage.md"
    text = page.read_text()
    page.write_text(re.sub(rf"{BEGIN}.*?{END}", lambda _: section(), text, flags=re.DOTALL))
    return [RECORD, page]


def _row(record: Record) -> Record:
    eager = record.get("eager", {})
    said = record.get("reason", "")
    reason = "; ".join(sorted(set(re.findall(r"\((\w+: [^()]*)\)", said)))) or said
    return {
        "class": record["class"],
        "status": record["status"],
        **({"layers": [eager["entered"], eager["layers"]]} if "layers" in eager else {}),
        **{mode: x for mode in ("eager", "sdpa") if (x := roundings(record, mode)) is not None},
        **({"generate": x} if (x := record.get("generate", {}).get("roundings")) is not None else {}),
        **({"reason": reason} if reason else {}),
    }


def roundings(record: Record, mode: str) -> float | None:
    """How far a stack that changes nothing lies off the model's own attention."""
    found: float | None = record.get(mode, {}).get("through", {}).get("roundings")
    return found


def sentence() -> str:
    """How many of them are served."""
    rows = json.loads(RECORD.read_text())["classes"]
    return f"Of {len(rows)} more whose attention is all outside it, {counted(row['status'] for row in rows)}"


def counted(statuses: Iterable[str]) -> str:
    """What became of them, in words."""
    count = collections.Counter(statuses)
    whole, part, refused, wrong = (count[status] for status in FOUND)
    share = (whole + part) / max(1, count.total())
    return (
        f"{whole} are served whole and {part} in part ({share:.1%} together), {refused} are refused with the reason "
        f"and {wrong} are wrong."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def section() -> str:
    """The part of docs/coverage.md, between its marks."""
    told = json.loads(RECORD.read_text())
    rows = told["classes"]
    exact = sum(row.get("eager") == 0 for row in rows)
    writes = [row["generate"] for row in rows if "generate" in row]
    made = ", ".join(f"{k} {v}" for k, v in told["versions"].items())
    lines = []
    for row in rows:
        layers = "{}/{}".format(*row["layers"]) if "layers" in row else ""
        far = [f"{row[mode]:g}" if mode in row else "" for mode in ("eager", "sdpa")]
        lines.append([row["class"], row["status"], layers, *far, row.get("reason", "").replace("|", "/")])
    return "\n\n".join([
        BEGIN + "\n## Outside the interface",
        f"{sentence()} They call torch's attention, or write it out: a product, a softmax, a product, which are "
        f"followed ([vision.md](vision.md)). Measured as above on {told['date']} with {made}: {exact} equal eager "
        f"attention bit for bit, and of {len(writes)} that generate {sum(x == 0 for x in writes)}; the others lie "
        "within the budget.",
        table(["class", "status", "layers", "eager", "sdpa", "reason"], lines) + "\n" + END,
    ])  # fmt: skip
