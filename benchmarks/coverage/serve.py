"""Measured coverage: every class that transformers' auto mappings name, served, refused with a reason, or wrong.

`python -m benchmarks.coverage.serve --out served.jsonl` sweeps, goes on where it stopped, and leaves what became of a
class as a JSON line; with `--keep` these take the place of what benchmarks/records/coverage.json knows of their
classes, and `make docs` makes docs/coverage.md of it. With `--heads` both are done of one column alone, what becomes of
a gate that is learned for each head, for the classes whose rows lack it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from transformers.utils import logging

from benchmarks.beside_torch import timm_for_transformers

from . import rows, sweep
from .names import class_names
from .probe import examine, examine_heads


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each class."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["class"]: record for record in map(json.loads, lines)}


def todo(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The classes to run, in an order in which what is done so far is a sample of the whole."""
    done = {name: record["status"] for name, record in read(options.out).items()}
    chosen = class_names()
    if options.heads:
        served = {row["class"]: row for row in rows.told()["classes"] if row["status"] in rows.RAN}
        chosen = [c for c in chosen if c[1] in served]
        done = {name: row["heads"] for name, row in served.items() if "heads" in row} | done
    again = re.compile(options.again) if options.again else None

    def wanted(group: str, name: str) -> bool:
        if not (re.search(options.only, name) and re.search(options.group, group)):
            return False
        return name not in done or (again is not None and bool(again.search(done[name])))

    chosen = [c for c in chosen if wanted(*c)]
    random.Random(0).shuffle(chosen)
    return chosen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; the newest line of a class counts")
    parser.add_argument("--only", default="", help="regular expression over class names")
    parser.add_argument("--group", default="", help="regular expression over groups")
    parser.add_argument("--again", default="", help="regular expression over statuses to run again, '.' for all")
    parser.add_argument("--heads", action="store_true", help="only what is learned for each head; see above")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds for one class")
    parser.add_argument("--keep", action="store_true", help="only take what is in --out into the record")
    options = parser.parse_args()
    if options.keep:
        found = read(options.out).values()
        print(rows.fill(found) if options.heads else rows.update(found, {name for _, name in class_names()}))
        return
    timm_for_transformers()  # of which some classes take an encoder
    sweep.examine = examine_heads if options.heads else examine  # the sweep's workers, with other questions
    for record in sweep.run(todo(options), options.workers, options.limit):
        if record["status"] == "cannot":  # it took too long, or its process died
            record["status"] = "cannot build"
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"{record['group']:14} {record['class']:45} {record['status']:14} {record.get('reason', '')[:200]}",
            flush=True,
        )


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
