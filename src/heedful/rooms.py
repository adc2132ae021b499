"""The rooms under `methods/`: each has a sentence, the docstring of its folder, that says which methods live there."""

from __future__ import annotations

import ast
from pathlib import Path

HOME = Path(__file__).parent / "methods"


def rooms(home: Path = HOME) -> dict[str, str]:
    """Every room's sentence, by its path below `methods/`."""
    found = {
        path.parent.relative_to(home).as_posix(): ast.get_docstring(ast.parse(path.read_text())) or ""
        for path in home.rglob("__init__.py")
        if path.parent != home
    }
    return dict(sorted(found.items()))
