"""The rooms under `methods/`: each has a sentence that says which methods live there, also those that wait for one."""

from __future__ import annotations

import ast
from pathlib import Path

HOME = Path(__file__).parent / "methods"
WAITING: dict[str, str] = {}  # rooms that are built with their first method


def rooms(home: Path = HOME) -> dict[str, str]:
    """Every room's sentence, by its path below `methods/`; of those that stand, the docstring."""
    standing = {
        path.parent.relative_to(home).as_posix(): ast.get_docstring(ast.parse(path.read_text())) or ""
        for path in home.rglob("__init__.py")
        if path.parent != home
    }
    return dict(sorted((WAITING | standing).items()))


def build(room: str, home: Path) -> Path | None:
    """Let a room stand that waited for its first method: the file that this took, if any."""
    file = home / room / "__init__.py"
    if file.parent.is_dir():
        return None
    file.parent.mkdir(parents=True)
    file.write_text(f'"""{rooms(home)[room]}"""\n')
    return file
