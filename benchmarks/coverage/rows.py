"""What is known of each class of transformers, in benchmarks/records/coverage.json: one row a class, with its own date.

A row is replaced when its class is measured again, so that a part of a sweep brings a part of the record up to date.
"""

from __future__ import annotations

import collections
import datetime as dt
import json
import re
from collections.abc import Container, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "records" / "coverage.json"
LIBRARIES = ROOT / "benchmarks" / "records" / "libraries.json"  # of timm, diffusers and open_clip
FOUND = ("served", "served in part", "refused", "wrong")
STATUSES = (*FOUND, "no attention", "cannot build")
RAN = ("served", "served in part", "wrong")  # rows of these tell of what is learned for each head
HEADS = ("fine", "refused", "not reached", "wrong")  # what becomes of it

Row = dict[str, Any]


def told() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def through() -> list[Row]:
    """Classes that have layers in the interface."""
    return [row for row in told()["classes"] if row["status"] in FOUND and not row.get("outside")]


def outside() -> list[Row]:
    """Classes whose attention is all outside it."""
    return [row for row in told()["classes"] if row.get("outside")]


def update(records: Iterable[Mapping[str, Any]], known: Container[str]) -> Path:
    """Take in what a sweep found; classes that transformers does not name any more go."""
    found = told() if RECORD.exists() else {}
    made = {"date": dt.datetime.now(dt.UTC).date().isoformat()} | {n: version(n) for n in ("transformers", "torch")}
    rows = {row["class"]: row for row in found.get("classes", ())} | {r["class"]: _row(r) | made for r in records}
    found = {"classes": [rows[name] for name in sorted(rows) if name in known]}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    return RECORD


def fill(records: Iterable[Mapping[str, Any]]) -> Path:
    """Take in what is told of the heads of classes whose rows lack that, and nothing else of them."""
    found = told()
    by_name = {row["class"]: row for row in found["classes"]}
    for record in records:
        row = by_name[record["class"]]
        if other := [f"{n} {row[n]}" for n in ("transformers", "torch") if row[n] != version(n)]:
            raise ValueError(f"{row['class']} was measured with {' and '.join(other)}: sweep it anew, without --heads")
        row.pop("heads_reason", None)
        row |= _heads(record["class"], record)
        if row["heads"] == "wrong":
            row |= {"status": "wrong", "reason": record["reason"]}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
    return RECORD


def _heads(name: str, told: Mapping[str, Any]) -> Row:
    """A row's word for what is learned for each head, and the reason where it is refused."""
    if told.get("status") not in HEADS:
        raise ValueError(
            f"{name}: nothing is told of what is learned for each head ({told.get('reason', 'no word')}), and a row of "
            f"what is served has one of {', '.join(HEADS)}; measure it with --heads"
        )
    return {"heads": told["status"]} | ({"heads_reason": told["reason"]} if told["status"] == "refused" else {})


def _row(record: Mapping[str, Any]) -> Row:
    eager, modes = record.get("eager", {}), ("eager", "sdpa")
    far = {mode: record.get(mode, {}).get("through", {}).get("roundings") for mode in modes}
    apart = record.get("through") is False and record["status"] in FOUND
    reason = record.get("reason", "")
    if apart:  # of each module its own
        reason = "; ".join(sorted(set(re.findall(r"\((\w+: [^()]*)\)", reason)))) or reason
    elif record["status"] == "cannot build":
        reason = reason[:160]
    row = {
        "class": record["class"],
        "group": record["group"],
        "status": record["status"],
        "outside": apart or None,
        "layers": [eager["entered"], eager["layers"]] if "layers" in eager else None,
        **far,
        "generate": record.get("generate", {}).get("roundings"),
        "own": record.get("own"),
        "reason": reason or None,
        "unseen": any(record.get(mode, {}).get("unseen") for mode in modes) or None,
        **(_heads(record["class"], eager.get("heads", {})) if record["status"] in RAN else {}),
    }
    return {name: x for name, x in row.items() if x is not None}


def sentence() -> str:
    """How many classes are served, of both kinds."""
    return (
        f"Of {len(through())} classes that go through transformers' attention interface, {counted(through())} "
        f"Of {len(outside())} more whose attention is all outside it, {counted(outside())}"
    )


def counted(rows: Iterable[Row]) -> str:
    """What became of them, in words."""
    count = collections.Counter(row["status"] for row in rows)
    whole, part, refused, wrong = (count[status] for status in FOUND)
    share = (whole + part) / max(1, count.total())
    return (
        f"{whole} are served whole and {part} in part ({share:.1%} together), {refused} are refused with the reason "
        f"and {wrong} are wrong."
    )
