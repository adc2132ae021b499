"""Finds every method by scanning the files under `methods/`; a method's file is its only registration."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import pkgutil
import re
import sys
from dataclasses import fields
from functools import cache
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heedful.core.asked import asks
from heedful.core.entry import CatalogueEntry
from heedful.core.errors import CatalogueError, FieldError, nearest
from heedful.core.kinds.weights import Weights
from heedful.core.method import Method, Stack
from heedful.core.reading import name_in, written
from heedful.core.spelling import name_of

if TYPE_CHECKING:
    from heedful.text_models import Contender

HOME = Path(__file__).parent / "methods"
FILE = re.compile(r"(.+\.py)(?::(\w+))?")  # of one's own, and a method in it
_READ: dict[str, bytes] = {}  # what stood in each file of one's own when it was read last, by its module


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


@asks
def find(name: str) -> type[CatalogueEntry]:
    """The class of that name, whatever its case, or of a file of one's own; an error with near names otherwise."""
    if file := FILE.fullmatch(name):
        return _of_file(Path(file[1]), file[2])
    known = entries()
    by_lower = {k.lower(): v for k, v in known.items()}
    by_lower |= {paper.key.lower(): v for v in known.values() for paper in v.paper.every}
    requested = by_lower.get(name.lower().replace("_", "").replace("-", ""))
    if requested is None:
        raise CatalogueError(
            f"no method named {name!r}.{nearest(name, known)} `heedful methods` lists all {len(known)}; "
            "one of your own goes by its file, as in mine.py"
        )
    return requested


def _of_file(file: Path, name: str | None) -> type[CatalogueEntry]:
    """The class of a file outside of heedful, which is imported by its own name: the one there, or the one named.

    A file that was changed since is read again, as by whoever mends it beside a notebook.
    """
    if not file.is_file():
        raise CatalogueError(f"there is no file '{file}'; a method of your own is named by a file that exists")
    there = sys.modules.get(file.stem)
    spec: Any = PathFinder.find_spec(file.stem) if there is None else getattr(there, "__spec__", None)
    origin = getattr(spec, "origin", None)
    if (there or origin) and Path(origin or "").resolve() != file.resolve():
        raise CatalogueError(f"{file}: there is a module named {file.stem} already; give the file another name")
    source = file.read_bytes()
    if there is None or _READ.setdefault(file.stem, source) != source:
        loader = SourceFileLoader(file.stem, str(file))
        spec = importlib.util.spec_from_loader(file.stem, loader)
        there = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        _READ[file.stem] = source
        lines = importlib.util.decode_source(source).splitlines(keepends=True)
        linecache.cache[str(file)] = len(source), None, lines, str(file)  # its code is told as it was read
        try:
            exec(loader.source_to_code(source, str(file)), vars(there))
        except BaseException:
            del sys.modules[file.stem]
            raise
    kinds = {x.__name__: x for x in vars(there).values() if isinstance(x, type) and issubclass(x, CatalogueEntry)}
    own = {k: x for k, x in kinds.items() if x.__module__ == file.stem and not k.startswith("_")}
    if not own:
        raise CatalogueError(f"{file} has no method: write a class in it (CONTRIBUTING.md)")
    if name is None and len(own) == 1:
        return next(iter(own.values()))
    if name not in own:
        which = f"no method named {name!r}" if name else "several methods"
        raise CatalogueError(f"{file} has {which}; name one of {', '.join(f'{file}:{k}' for k in own)}")
    return own[name]


@asks
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


def parted(text: str, by: str = ",") -> list[str]:
    """What stands between commas, but for those within brackets."""
    return [part for part in _between(text, by) if part]


def _between(text: str, by: str) -> list[str]:
    """The same, with the places where nothing stands."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == by and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def entry_from(text: str) -> CatalogueEntry:
    """A method from its name, with the settings that follow or the defaults: `SinkWindow`, `SinkWindow(window=64)`."""
    kind = find(name_in(text))
    return written(text, kind, kind.example())


def joined(text: str, owner: str, field: str) -> list[CatalogueEntry]:
    """What `|` joins, each by its name; a place without a name is refused."""
    names = _between(text, "|")
    if not all(names):
        rule = "names no method beside a |" if any(names) else "names no method"
        raise FieldError(owner, field, text, rule, "SinkWindow | TempScale")
    return [entry_from(name) for name in names]


def stack_from(text: str, owner: str = "compare()", field: str = "methods") -> Contender:
    """What can be tried on a model: one step, or methods joined by `|`; without settings, with the defaults."""
    entries = joined(text, owner, field)
    if len(entries) == 1 and not isinstance(entries[0], Weights):
        return entries[0]  # type: ignore[return-value]  # every other kind of entry is one
    for entry in entries:
        if not isinstance(entry, Method):
            rule = f"{type(entry).__name__} is {entry.kind}, which cannot be joined"
            raise FieldError(owner, field, text, rule, "SinkWindow | TempScale")
    return Stack(tuple(entry for entry in entries if isinstance(entry, Method)))


def room(kind: type[CatalogueEntry]) -> str:
    """The folder under `methods/` that a method's file lies in, such as 'sparse/cache'."""
    return "/".join(kind.__module__.split(".")[2:-1])


def in_room(text: str) -> list[str]:
    """The text once for each method of the room that it names, as in `sparse/cache(budget=0.25)`; else itself.

    Those are meant that have every setting that follows, and act on something.
    """
    name, opened, settings = text.partition("(")
    home = f"{name.strip().strip('/')}/"
    living = [k for k in entries().values() if f"{room(k)}/".startswith(home) and not issubclass(k, Weights)]
    if not living and "/" in name and not FILE.search(name):
        rooms = sorted({room(kind) for kind in entries().values()})
        raise CatalogueError(f"no room named {name!r}.{nearest(name, rooms)} There are {', '.join(rooms)}.")
    if not living:
        return [text]
    words = [part.partition("=") for part in parted(settings.removesuffix(")"))]
    for word, equals, _ in words:
        if not equals:
            rule = f"settings for all of {name} need names"
            raise FieldError("compare()", "methods", text, rule, f"{name}(budget={word})")
    wanted = {word.strip() for word, _, _ in words}
    found = [kind for kind in living if wanted <= {field.name for field in fields(kind)}]
    if not found:
        rule = f"no method of {name} has {' and '.join(sorted(wanted))}"
        raise FieldError("compare()", "methods", text, rule, name)
    return [kind.__name__ + opened + settings for kind in found]


def family(kind: type[CatalogueEntry]) -> str:
    """The folder a method's file lies in, such as 'observe'."""
    parts = kind.__module__.split(".")
    return parts[2] if parts[:2] == ["heedful", "methods"] and len(parts) > 3 else "outside"


@asks
def search(word: str = "") -> list[type[CatalogueEntry]]:
    """Those in whose name, room, docstring or paper the word occurs; who quantises also finds quantization."""
    low = re.sub("is(e|ation)$", "is", _spelled(word))
    return [kind for name, kind in entries().items() if low in _spelled(f"{name} {_about(kind)}")]


def _about(kind: type[CatalogueEntry]) -> str:
    home = room(kind).replace("/", " ") or family(kind)
    papers = " ".join(f"{paper.title} {paper.key} {paper.authors}" for paper in kind.paper.every)
    return f"{home} {kind.__doc__} {papers}"


def _spelled(text: str) -> str:
    """In lower case, and as the British write it."""
    return text.lower().replace("iz", "is")
