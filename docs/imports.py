"""Who imports whom, read from the files and not from a run. Imports within functions count, names for types do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import heedful

HOME = Path(heedful.__file__).parent
SHORT = heedful._HOMES | heedful._MODULES  # what `from heedful import NAME` stands for


class Import(NamedTuple):
    module: str
    at_once: bool  # where the file is read, and not only when a function is called


def modules(home: Path = HOME) -> dict[str, Path]:
    """Every file of the package, by the name it is imported under."""
    found = {}
    for path in sorted(home.rglob("*.py")):
        parts = (home.name, *path.relative_to(home).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    """What a file imports of the package."""
    for home, names, at_once in _statements(path.read_text()):
        if home is not None:
            full = [f"{home}.{name}" if f"{home}.{name}" in known else home for name in names]
            short = SHORT if home == HOME.name else {}
            names = tuple(short.get(name, long) for name, long in zip(names, full, strict=True))
        yield from (Import(name, at_once) for name in dict.fromkeys(names) if name in known)


@cache
def _statements(text: str) -> tuple[tuple[str | None, tuple[str, ...], bool], ...]:
    """Where each import of a file imports from, if it says so, what, and whether it does where the file is read."""
    tree, found = ast.parse(text), []
    asides = [node for node in tree.body if isinstance(node, ast.If)]  # TYPE_CHECKING and __main__
    skipped = {id(x) for node in asides for x in ast.walk(node)}
    top = {id(x) for x in tree.body}
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        home = (node.module or "") if isinstance(node, ast.ImportFrom) else None
        found.append((home, tuple(a.name for a in node.names), id(node) in top))
    return tuple(found)


def graph(home: Path = HOME) -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules(home)
    return {name: {found.module for found in imports(path, known)} - {name} for name, path in known.items()}


def circles(found: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import one another, straight or by way of others."""
    reached = {name: _reached(name, found) for name in found}
    groups = {tuple(sorted(x for x in reached[name] if name in reached[x])) for name in found if name in reached[name]}
    return sorted(map(list, groups))


def _reached(name: str, found: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    queue = list(found[name])
    while queue:
        if (one := queue.pop()) not in seen:
            seen.add(one)
            queue += found[one]
    return seen
