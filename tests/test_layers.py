"""Imports point downwards, as DESIGN.md draws them; read from the files, not from a run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import heedful

HOME = Path(heedful.__file__).parent
BELOW = {  # what each room may import, besides itself
    "core": set(),
    "native": {"core"},
    "kit": {"core"},
    "engine": {"core", "native"},
    "adapters": {"core", "engine", "native"},
    "methods": {"core", "kit", "authoring"},
    "report": {"core", "catalogue"},
    "laboratory": {
        "core",
        "engine",
        "api",
        "bench",
        "catalogue",
        "facts",
        "methods",
        "report",
    },
    "conformance": {
        "core",
        "engine",
        "adapters",
        "native",
        "tiny",
        "models",
        "catalogue",
        "folding",
        "saving",
        "api",
        "text_models",
    },
}
LAZILY = {  # inside a function, where a name is only looked up when it is needed
    "methods": {"catalogue", "explaining", "api"},
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[tuple[str, bool]]:
    """The rooms that a file imports, and whether it does so where it is read."""
    tree = ast.parse(path.read_text())
    demo = [n for n in tree.body if isinstance(n, ast.If)]  # TYPE_CHECKING and __main__
    skip = {id(x) for node in demo for x in ast.walk(node)}
    top = {id(x) for x in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("heedful"):
            names = [node.module] if "." in node.module else [f"heedful.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("heedful.")]
        found += [(room(name), id(node) in top) for name in names]
    return found


@pytest.mark.parametrize("name", sorted(name for name in BELOW if (HOME / name).is_dir()))
def test_a_room_imports_only_what_lies_below_it(name: str) -> None:
    wrong = [
        f"{path.relative_to(HOME)}: {to}"
        for path in sorted((HOME / name).rglob("*.py"))
        for to, at_once in imports(path)
        if to != name and to not in BELOW[name] and (at_once or to not in LAZILY.get(name, set()))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_a_planted_one(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from heedful.engine.run import Run\nfrom heedful import attach\ndef f():\n    import heedful.cli.app\n"
    )
    assert imports(file) == [("engine", True), ("attach", True), ("cli", False)]


def test_no_folder_is_crowded() -> None:
    crowded = {str(p.parent.relative_to(HOME)): 0 for p in HOME.rglob("*.py")}
    for path in HOME.rglob("*.py"):
        crowded[str(path.parent.relative_to(HOME))] += 1
    assert not {name: n for name, n in crowded.items() if n > 31}
