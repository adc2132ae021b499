"""Imports point downwards, as DESIGN.md draws them; read from the files, not from a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.imports import HOME, circles, graph, imports, modules

KNOWN = modules()
BELOW = {  # what each room may import, besides itself
    "core": set(),
    "native": {"core"},
    "gpu": set(),
    "kit": {"core"},
    "engine": {"core", "native", "gpu"},
    "adapters": {"core", "engine", "native"},
    "methods": {"core", "kit", "authoring"},
    "nn": {"core", "engine", "adapters"},
    "report": {"core", "catalogue"},
    "laboratory": {
        "core",
        "kit",
        "engine",
        "adapters",
        "api",
        "bench",
        "catalogue",
        "facts",
        "methods",
        "report",
        "tasks",
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


@pytest.mark.parametrize("name", sorted(name for name in BELOW if (HOME / name).is_dir()))
def test_a_room_imports_only_what_lies_below_it(name: str) -> None:
    wrong = [
        f"{path.relative_to(HOME)}: {to}"
        for path in sorted((HOME / name).rglob("*.py"))
        for to, at_once in ((room(found.module), found.at_once) for found in imports(path, KNOWN))
        if to != name and to not in BELOW[name] and (at_once or to not in LAZILY.get(name, set()))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_reader_of_imports_sees_a_planted_one(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from heedful.engine.run import Run\nfrom heedful import attach\ndef f():\n    import heedful.cli.app\n"
        "from heedful.core import sites\nif TYPE_CHECKING:\n    from heedful.kit import topk\nimport os\n"
    )
    found = sorted(imports(file, modules()))
    assert found == [
        ("heedful.api", True), ("heedful.cli.app", False), ("heedful.core.sites", True), ("heedful.engine.run", True)
    ]  # fmt: skip


def test_no_module_imports_in_a_circle() -> None:
    """Not within a function either, where a circle can be hidden."""
    found = graph()
    assert len(found) > 200
    assert circles(found) == []


PLANTED = {
    "one": ("from heedful.b import y", "from heedful.a import x"),
    "in a function": ("def f():\n    from heedful.b import y", "import heedful.a"),
    "by way of a third": ("from heedful import c", "from heedful.a import x", "def g():\n    import heedful.b"),
}


@pytest.mark.parametrize("files", PLANTED.values(), ids=list(PLANTED))
def test_a_planted_circle_is_seen(tmp_path: Path, files: tuple[str, ...]) -> None:
    home = tmp_path / "heedful"
    home.mkdir()
    for name, text in zip(("__init__", "a", "b", "c"), ("", *files, *[""] * (3 - len(files))), strict=True):
        (home / f"{name}.py").write_text(text)
    names = ["heedful.a", "heedful.b", *["heedful.c"] * (len(files) - 2)]
    assert circles(graph(home)) == [names]


def test_a_name_for_types_alone_makes_no_circle(tmp_path: Path) -> None:
    home = tmp_path / "heedful"
    home.mkdir()
    (home / "a.py").write_text("from heedful.b import y")
    (home / "b.py").write_text("if TYPE_CHECKING:\n    from heedful.a import x")
    assert circles(graph(home)) == []


def test_no_folder_is_crowded() -> None:
    crowded = {str(p.parent.relative_to(HOME)): 0 for p in HOME.rglob("*.py")}
    for path in HOME.rglob("*.py"):
        crowded[str(path.parent.relative_to(HOME))] += 1
    assert not {name: n for name, n in crowded.items() if n > 31}
