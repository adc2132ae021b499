"""What compare measures: small frozen values that make prompts and score what a model makes of them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from heedful.core.asked import asks
from heedful.core.errors import CatalogueError, nearest
from heedful.core.files import is_there
from heedful.core.reading import name_in, written
from heedful.diagnosis.texts import ENDINGS
from heedful.tasks._files import from_file
from heedful.tasks._own import OwnText
from heedful.tasks._rows import named_as
from heedful.tasks._scene_words import SceneWords
from heedful.tasks._scenes import Scene, Scenes
from heedful.tasks.task import Task

__all__ = ["Scene", "SceneWords", "Scenes", "Task", "find", "from_file", "known", "named_as"]


@cache
def known() -> dict[str, type[Task]]:
    """Every task that heedful ships, by its name on the command line; a task's file is its only registration."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    found = [
        thing
        for module in modules
        for name, thing in vars(module).items()
        if not name.startswith("_") and inspect.isclass(thing) and thing.__module__ == module.__name__
        if issubclass(thing, Task) and not inspect.isabstract(thing)
    ]
    by_name = {kind.name: kind for kind in found}
    if len(by_name) < len(found):
        raise CatalogueError(f"two tasks have one name: {sorted(kind.name for kind in found)}")
    return dict(sorted(by_name.items()))


@asks
def find(text: str) -> Task:
    """A task by its name or its class's, with settings if they follow: `needle`, `Needle(length=512)`.

    What is a file or folder, or written as one, is read by `from_file`: `my.jsonl`, `notes/(length=1024)`.
    """
    kinds = known()
    by_plain = {_plain(name): kind for kind in kinds.values() for name in (kind.name, kind.__name__)}
    kind = by_plain.get(_plain(name_in(text)))
    if kind is None and _is_path(name_in(text)):
        return from_file(name_in(text), **vars(written(text, FromFile, "notes/(length=1024)")))
    if kind is None:
        rule = f"no task named {name_in(text)!r}, nor a file or folder.{nearest(name_in(text), kinds)}"
        raise CatalogueError(f"{rule} Known: {', '.join(kinds)}")
    return written(text, kind, kind())


@dataclass(frozen=True)
class FromFile:
    """The settings of `from_file`, as they may follow a path."""

    length: int = OwnText.length


def _is_path(text: str) -> bool:
    return is_there(text) or "/" in text or Path(text).suffix in ENDINGS


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
