"""What compare measures: small frozen values that make prompts and score what a model makes of them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from heedful.core.asked import asks
from heedful.core.errors import CatalogueError, nearest
from heedful.core.reading import named, written
from heedful.tasks.task import Task

__all__ = ["Task", "find", "known", "names"]


@cache
def known() -> dict[str, type[Task]]:
    """Every task that heedful ships, by its name on the command line; a task's file is its only registration."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    found = [
        thing
        for module in modules
        for name, thing in vars(module).items()
        if not name.startswith("_") and inspect.isclass(thing) and thing.__module__ == module.__name__
        if issubclass(thing, Task) and not inspect.isabstract(thing)
    ]
    names = {kind.name: kind for kind in found}
    if len(names) < len(found):
        raise CatalogueError(f"two tasks have one name: {sorted(kind.name for kind in found)}")
    return dict(sorted(names.items()))


def names() -> dict[str, str]:
    """What each task is about, by its name."""
    return {name: kind.about for name, kind in known().items()}


@asks
def find(text: str) -> Task:
    """A task by its name or its class's, with settings if they follow: `needle`, `Needle(length=512)`."""
    kinds = known()
    by_plain = {_plain(name): kind for kind in kinds.values() for name in (kind.name, kind.__name__)}
    kind = by_plain.get(_plain(named(text)))
    if kind is None:
        raise CatalogueError(f"no task named {named(text)!r}.{nearest(named(text), kinds)} Known: {', '.join(kinds)}")
    return written(text, kind, kind())


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
