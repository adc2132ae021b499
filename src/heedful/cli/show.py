"""`heedful show METHOD`: all about one."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from heedful.cli.console import console

if TYPE_CHECKING:
    from heedful.core.entry import CatalogueEntry
    from heedful.core.paper import Paper


FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (.*))?")


class Setting(NamedTuple):
    """A field of a method, as its source and its class tell of it."""

    name: str
    default: str  # as it is written; "" where there is none
    takes: str
    meaning: str


def settings(kind: type[CatalogueEntry]) -> list[Setting]:
    """The fields of an entry, those of its bases first."""
    from heedful.core.asked import takes

    said: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        if not base.__module__.startswith("heedful.core."):
            said |= comments(inspect.getsource(base))
    words = takes(kind)
    made = {
        x.name: x.default_factory() if x.default_factory is not MISSING else x.default for x in fields(kind) if x.init
    }
    return [
        Setting(name, "" if default is MISSING else repr(default), words.get(name, ""), said.get(name, ""))
        for name, default in made.items()
    ]


@cache
def comments(source: str) -> dict[str, str]:
    """The comment behind each field of a class, or on the lines above it."""
    out: dict[str, str] = {}
    above: list[str] = []
    for line in source.splitlines():
        if found := FIELD.fullmatch(line):
            out[found[1]] = found[2] or " ".join(above)
        above = [*above, line.strip("# ")] if line.startswith("    # ") else []
    return out


def role(kind: type[CatalogueEntry]) -> str:
    """What an entry is in a call: where it acts and what it reads, or of which other kind it is."""
    from heedful.core.method import Method

    if not issubclass(kind, Method):
        return kind.kind
    found: dict[str, list[str]] = {}
    for edit in sorted(kind.edits, key=lambda e: e.reads):
        found.setdefault("reads" if edit.reads else "acts at", []).append(edit.site.name)
    return ", ".join(f"{does} {' and '.join(dict.fromkeys(where))}" for does, where in found.items())


def show(
    name: Annotated[str, typer.Argument(help="A method's or function's name, its paper's id, or a file of your own.")],
) -> None:
    """Tell what a method does, its settings, its paper, and what we do unlike the authors; of a function, likewise."""
    from heedful.catalogue import family
    from heedful.functions import Function, found

    kind = found(name)
    if isinstance(kind, Function):
        console.print(f"{kind.call}\n{kind.about}", markup=False, highlight=False)
        for option, told in kind.options.items():
            console.print(f"  {option}{told}", markup=False, highlight=False)
        _tell(kind.paper)
        return
    module = inspect.getmodule(kind)
    console.print(f"[bold]{kind.__name__}[/]  {family(kind)}, {role(kind)}")
    console.print((module.__doc__ or "").strip() if module else "", style="cyan", markup=False)
    console.print(inspect.cleandoc(kind.__doc__ or ""), markup=False)
    for one in settings(kind):
        default = one.default and f" = {one.default}"
        console.print(f"  {one.name}{default}  {one.meaning}{one.takes and f' ({one.takes})'}", markup=False)
    _tell(kind.paper)


def _tell(first: Paper | None) -> None:
    for paper in first.every if first else ():
        console.print(f"\n{paper.authors}. {paper.title}. {paper.appeared}. {paper.link}", markup=False)
        for sentence in paper.differs:
            console.print(f"  unlike the authors: {sentence}", markup=False)
