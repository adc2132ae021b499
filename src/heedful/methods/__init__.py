"""One file, one paper, one class: `from heedful.methods import SnapKV`."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any


@cache
def files() -> dict[str, str]:
    """Each method's module by its name without underscores, found by the names of files; none of them is imported."""
    found = (info.name for info in pkgutil.walk_packages(__path__, f"{__name__}.") if not info.ispkg)
    stems = {name: name.rpartition(".")[2] for name in found}
    return {stem.replace("_", ""): name for name, stem in sorted(stems.items()) if not stem.startswith("_")}


def __getattr__(name: str) -> Any:
    if name == "__all__":  # of a star
        return __dir__()
    if not name.startswith("_"):
        if (home := files().get(name.lower())) is not None and hasattr(module := import_module(home), name):
            return getattr(module, name)
        from heedful.catalogue import entries
        from heedful.core.errors import absent

        known = entries()  # a class may stand in a file of another name
        if name in known:
            return known[name]
        raise absent(__name__, name, known, " `heedful methods` lists them all.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from heedful.catalogue import entries

    return sorted(entries())
