"""`heedful show METHOD`: all about one."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated

import typer

from heedful.cli.console import console

if TYPE_CHECKING:
    from heedful.core.method import CatalogueEntry
    from heedful.core.paper import Paper


def comments(source: str) -> dict[str, str]:
    """The comment behind each field of a class."""
    out = {}
    for line in source.splitlines():
        name, colon, rest = line.strip().partition(":")
        if colon and "#" in rest and name.isidentifier():
            out[name] = rest.split("#", 1)[1].strip()
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
    said = comments(inspect.getsource(kind))
    for field in fields(kind):
        default = "" if field.default is MISSING else f" = {field.default!r}"
        console.print(f"  {field.name}{default}  {said.get(field.name, '')}".rstrip(), markup=False)
    _tell(kind.paper)


def _tell(first: Paper | None) -> None:
    for paper in first.every if first else ():
        console.print(f"\n{paper.authors}. {paper.title}. {paper.appeared}. {paper.link}", markup=False)
        for sentence in paper.differs:
            console.print(f"  unlike the authors: {sentence}", markup=False)
