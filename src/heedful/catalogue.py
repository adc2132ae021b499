"""Finds every method by scanning the files under `methods/`; a method's file is its only registration."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from heedful.core.errors import CatalogueError, nearest
from heedful.core.method import CatalogueEntry
from heedful.core.spelling import name_of

HOME = Path(__file__).parent / "methods"


@cache
def entries() -> dict[str, type[CatalogueEntry]]:
    """Every method, token step, decoding step and surgery that heedful ships, by class name."""
    found: dict[str, type[CatalogueEntry]] = {}
    for info in pkgutil.walk_packages([str(HOME)], "heedful.methods."):
        if info.ispkg or info.name.rpartition(".")[2].startswith("_"):  # the latter hold what several methods share
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or not isinstance(thing, type) or thing.__module__ != info.name:
                continue
            if issubclass(thing, CatalogueEntry):
                if name in found:
                    raise CatalogueError(f"two methods are named {name}: {found[name].__module__} and {info.name}")
                found[name] = thing
    return dict(sorted(found.items()))


def find(name: str) -> type[CatalogueEntry]:
    """The class of that name, whatever its case; an error with near names otherwise."""
    known = entries()
    by_lower = {k.lower(): v for k, v in known.items()} | {v.paper.key.lower(): v for v in known.values()}
    requested = by_lower.get(name.lower().replace("_", "").replace("-", ""))
    if requested is None:
        raise CatalogueError(
            f"no method named {name!r}.{nearest(name, known)} `heedful methods` lists all {len(known)}."
        )
    return requested


def named(name: str) -> type[CatalogueEntry]:
    """The class that a file means by that name: one of the catalogue, or one of a module that is imported already."""
    if name in entries():
        return entries()[name]
    queue: list[type[CatalogueEntry]] = [CatalogueEntry]
    found = None
    while queue:
        kind = queue.pop(0)
        queue += kind.__subclasses__()
        if name_of(kind) == name:
            found = kind  # a later definition takes the place of an earlier one, as in a notebook
    if found is None and "." in name:
        raise CatalogueError(f"{name} is defined outside of heedful: import {name.rpartition('.')[0]} first")
    return find(name) if found is None else found


def family(kind: type[CatalogueEntry]) -> str:
    """The folder a method's file lies in, such as 'observe'."""
    parts = kind.__module__.split(".")
    return parts[2] if parts[:2] == ["heedful", "methods"] and len(parts) > 3 else "outside"


def search(word: str = "") -> list[type[CatalogueEntry]]:
    """CachedKV in whose name, family, docstring or paper the word occurs."""
    low = word.lower()
    return [
        kind
        for name, kind in entries().items()
        if low
        in f"{name} {family(kind)} {kind.__doc__} {kind.paper.title} {kind.paper.key} {kind.paper.authors}".lower()
    ]
