"""python -m benchmarks.mutants [NAMES] [--count 10]: files of methods, of verbs and of what they share; it resumes."""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
from functools import cache
from pathlib import Path

from benchmarks.mutants import changes, probe
from benchmarks.mutants.page import EQUIVALENT, RECORD, ROOT, Row
from docs.imports import graph, modules
from heedful import explaining

KIT, METHODS, EXPLAINING = (ROOT / "src" / "heedful" / room for room in ("kit", "methods", "explaining"))
VERBS = set(explaining._HOMES.values())  # type: ignore[attr-defined]  # no name for others, so not in the stub
PATIENCE = 8.0  # a change may slow the tests this much before it counts as hung


def files() -> list[Path]:
    """Every file of a method or an explaining verb, and what several of them share."""
    homes = (KIT, METHODS, EXPLAINING)
    return sorted(path for home in homes for path in home.rglob("*.py") if path.name != "__init__.py")


def is_shared(path: Path) -> bool:
    """Whether it is no method's or verb's own: in the kit, or beside those that share it."""
    if path.parent == EXPLAINING:
        return path.stem not in VERBS
    return path.parent == KIT or path.name.startswith("_")


def _own_tests(path: Path) -> list[Path]:
    """`test_X.py` for `X.py`, and `test_X_more.py` where they are many."""
    tests = ROOT / "tests"
    homes = {KIT: (tests, tests / "kit"), EXPLAINING: (tests,)}.get(path.parent, (tests / "methods",))
    names = (path.stem, f"{path.stem}_*")
    return [p for name in names for home in homes for p in sorted(home.glob(f"test_{name}.py"))]


def tests_of(path: Path) -> list[Path]:
    """A file's own tests; behind those of what is shared the tests of those who use it, however they do."""
    found = _own_tests(path)
    if is_shared(path):
        found += [test for user in users(path) for test in _own_tests(user)]
    elif found and found[0].stem != f"test_{path.stem}":
        found = []
    if not found:
        raise SystemExit(f"{path.name} needs a file of tests, test_{path.name}")
    return list(dict.fromkeys(found))


@cache
def _imports() -> tuple[dict[str, Path], dict[str, set[str]]]:
    return modules(), graph()


def users(path: Path) -> list[Path]:
    """The methods and verbs that import a shared file, straight or by way of another one that is shared."""
    (known, imports), name = _imports(), _module(path)
    found, queue = set(), [name]
    while queue:
        one = queue.pop()
        for user in (user for user, wants in imports.items() if one in wants):
            if is_shared(known[user]):
                queue.append(user)
            elif {METHODS, EXPLAINING} & {*known[user].parents}:
                found.add(known[user])
    return sorted(found)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)


def _state(path: Path) -> str:
    """Of all that a file's row depends on: what it and its tests do, and which changes could be made."""
    parts = [changes.code(part.read_text()) for part in (path, *tests_of(path))]
    return hashlib.sha256("\0".join([*parts, *(m.name for m in _candidates(path))]).encode()).hexdigest()[:16]


def _left_out(path: Path) -> dict[str, str]:
    """The changes that no test could tell from the original, and why."""
    named: dict[str, dict[str, str]] = json.loads(EQUIVALENT.read_text())
    return named.get(path.stem, {})


def _candidates(path: Path) -> list[changes.Mutant]:
    found, left_out = changes.mutants(path.read_text()), _left_out(path)
    if stale := set(left_out) - {m.name for m in found}:
        raise SystemExit(f"{EQUIVALENT.name}: {path.stem} has no such change: {', '.join(sorted(stale))}")
    return [m for m in found if m.name not in left_out]


def _chosen(path: Path, most: int) -> list[changes.Mutant]:
    return changes.choose(_candidates(path), most, path.stem)


def _computed() -> float:
    """Seconds that processors have spent on children of this process."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def measure(path: Path, most: int) -> Row:
    """The mutants of one file, each tried."""
    module, source, tests = _module(path), path.read_text(), tests_of(path)
    chosen = _chosen(path, most)
    state, begun = _state(path), _computed()
    if not probe.survives(module, path, tests, None, 600.0):
        raise SystemExit(f"{tests[0].relative_to(ROOT)} fails on the file as it is")
    limit = 20.0 + PATIENCE * (_computed() - begun)
    survivors = [m for m in chosen if probe.survives(module, path, tests, changes.changed(source, m), limit)]
    return {
        "state": state,
        "made": len(chosen),
        "caught": len(chosen) - len(survivors),
        "survivors": [{"line": m.line, "change": m.name} for m in survivors],
    }


def main() -> None:
    words = argparse.ArgumentParser(prog="benchmarks.mutants", description=__doc__)
    what = "files of methods, of explaining verbs or of what they share, as in `vhr`, `logits` or `blocks`; none: all"
    words.add_argument("names", nargs="*", help=what)
    words.add_argument("--count", type=int, default=10, help="mutants a file")
    given = words.parse_args()
    paths = {path.stem: path for path in files()}
    if unknown := set(given.names) - set(paths):
        raise SystemExit(f"no file of methods or verbs is called {', '.join(sorted(unknown))}")
    probe.warm()
    for name in given.names or paths:
        record: dict[str, Row] = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        old, path = record.get(name), paths[name]
        if old and not given.names and old["state"] == _state(path) and old["made"] >= len(_chosen(path, given.count)):
            continue
        row = measure(path, given.count)
        record = (json.loads(RECORD.read_text()) if RECORD.exists() else {}) | {name: row}  # others may have written
        known = {path.stem for path in files()}  # by now: a branch may have been merged meanwhile
        RECORD.write_text(json.dumps({k: record[k] for k in sorted(record) if k in known}, indent=1) + "\n")
        print(f"{name}: {row['caught']} of {row['made']}", flush=True)
        for one in row["survivors"]:
            print(f"  line {one['line']}: {one['change']}", flush=True)


if __name__ == "__main__":
    main()
