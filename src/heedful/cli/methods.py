"""`heedful methods [WORD]`: what there is."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from heedful.cli.console import console
from heedful.core.errors import CatalogueError

if TYPE_CHECKING:
    from heedful.core.entry import CatalogueEntry


def sites(kind: type[CatalogueEntry]) -> str:
    """Where an entry acts."""
    from heedful.core.method import Method

    if issubclass(kind, Method):
        return " ".join(("reads " if e.reads else "") + e.site.name for e in kind.edits)
    return kind.kind


def plain(kind: type[CatalogueEntry]) -> dict[str, Any]:
    """An entry for machines."""
    from heedful.catalogue import family
    from heedful.core.method import Method

    method = kind if issubclass(kind, Method) else None
    return {
        "name": kind.__name__,
        "family": family(kind),
        "kind": kind.kind,
        "module": kind.__module__,
        "paper": kind.paper.key,
        "also": [paper.key for paper in kind.paper.also],
        "title": kind.paper.title,
        "link": kind.paper.link,
        "sites": [{"site": e.site.name, "reads": e.reads} for e in method.edits] if method else [],
        "subjects": list(method.subjects) if method else ["text"],
        "about": inspect.cleandoc(kind.__doc__ or "").splitlines()[0],
    }


def methods(
    word: Annotated[str, typer.Argument(help="Show only those in which this word occurs.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the methods, with where they act and their papers."""
    from heedful.catalogue import family, search
    from heedful.functions import sought

    found = search(word)
    other = sought(word)
    if not found and not other:
        raise CatalogueError(f"no method mentions {word!r}; `heedful methods` lists them all")
    if as_json:
        calls = [{"name": call.partition("(")[0], "kind": "function", "call": call} for call in other]
        typer.echo(json.dumps([*calls, *map(plain, found)], indent=1))
        return
    for call in other:
        console.print(f"In Python: {call}", markup=False, highlight=False)
    if not found:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "family", "acts at", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column == "family")
    for kind in found:
        what = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        table.add_row(kind.__name__, family(kind), sites(kind), escape(what))
    console.print(table, soft_wrap=False)
