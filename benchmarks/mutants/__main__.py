"""python -m benchmarks.mutants [NAMES] [--count 10]: every method's file, or those named (`vhr`); it resumes."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

from benchmarks.mutants import changes, probe
from benchmarks.mutants.page import EQUIVALENT, RECORD, ROOT, Row

METHODS = ROOT / "src" / "heedful" / "methods"
PATIENCE = 8.0  # a change may slow the tests this much before it counts as hung


def files() -> list[Path]:
    """Every method's file."""
    return sorted(path for path in METHODS.rglob("*.py") if not path.name.startswith("_"))


def tests_of(path: Path) -> list[Path]:
    """The tests of a method's own: `test_X.py` for `X.py`, and `test_X_more.py` where they are many."""
    found = [p for name in (path.stem, f"{path.stem}_*") for p in sorted((ROOT / "tests").rglob(f"test_{name}.py"))]
    if not found or found[0].stem != f"test_{path.stem}":
        raise SystemExit(f"{path.name} needs a file of tests, test_{path.name}")
    return found


def _state(path: Path) -> str:
    """Of all that a file's row depends on: the file, its tests, and which changes are made."""
    parts = [part.read_bytes() for part in (path, *tests_of(path), Path(changes.__file__))]
    return hashlib.sha256(b"\0".join([*parts, json.dumps(_left_out(path)).encode()])).hexdigest()[:16]


def _left_out(path: Path) -> dict[str, str]:
    """The changes that no test could tell from the original, and why."""
    named: dict[str, dict[str, str]] = json.loads(EQUIVALENT.read_text())
    return named.get(path.stem, {})


def _chosen(path: Path, most: int) -> list[changes.Mutant]:
    found, left_out = changes.mutants(path.read_text()), _left_out(path)
    if stale := set(left_out) - {m.name for m in found}:
        raise SystemExit(f"{EQUIVALENT.name}: {path.stem} has no such change: {', '.join(sorted(stale))}")
    return changes.choose([m for m in found if m.name not in left_out], most, path.stem)


def measure(path: Path, most: int) -> Row:
    """The mutants of one file, each tried."""
    module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
    source, tests = path.read_text(), tests_of(path)
    chosen = _chosen(path, most)
    state, begun = _state(path), time.monotonic()
    if not probe.survives(module, path, tests, None, 600.0):
        raise SystemExit(f"{tests[0].relative_to(ROOT)} fails on the file as it is")
    limit = 20.0 + PATIENCE * (time.monotonic() - begun)
    survivors = [m for m in chosen if probe.survives(module, path, tests, changes.changed(source, m), limit)]
    return {
        "state": state,
        "made": len(chosen),
        "caught": len(chosen) - len(survivors),
        "survivors": [{"line": m.line, "change": m.name} for m in survivors],
    }


def main() -> None:
    words = argparse.ArgumentParser(prog="benchmarks.mutants", description=__doc__)
    words.add_argument("names", nargs="*", help="files of methods, as in `vhr`; none: all")
    words.add_argument("--count", type=int, default=10, help="mutants a file")
    given = words.parse_args()
    paths = {path.stem: path for path in files()}
    if unknown := set(given.names) - set(paths):
        raise SystemExit(f"no method's file is called {', '.join(sorted(unknown))}")
    probe.warm()
    for name in given.names or paths:
        record: dict[str, Row] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        old, path = record.get(name), paths[name]
        if old and not given.names and old["state"] == _state(path) and old["made"] >= len(_chosen(path, given.count)):
            continue
        row = measure(path, given.count)
        record = (json.loads(RECORD.read_text()) if RECORD.exists() else {}) | {name: row}  # others may have written
        RECORD.write_text(json.dumps({k: record[k] for k in sorted(record) if k in paths}, indent=1) + "\n")
        print(f"{name}: {row['caught']} of {row['made']}", flush=True)
        for one in row["survivors"]:
            print(f"  line {one['line']}: {one['change']}", flush=True)


if __name__ == "__main__":
    main()
