"""`heedful cite METHOD...`: BibTeX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from heedful.core.errors import CatalogueError

if TYPE_CHECKING:
    from heedful.core.paper import Paper


def cite(
    names: Annotated[list[str], typer.Argument(metavar="METHOD...", help="Names, paper ids, or stacks as elsewhere.")],
) -> None:
    """Print the BibTeX of the papers behind methods, and behind functions."""
    from heedful.catalogue import parted

    asked = (one for name in names for part in parted(name) or [name] for one in parted(part, "|") or [part])
    typer.echo("\n\n".join(dict.fromkeys(paper.bibtex() for name in asked for paper in _papers(name))))


def _papers(name: str) -> tuple[Paper, ...]:
    from heedful.functions import found

    asked = found(name)
    if asked.paper is None:
        raise CatalogueError(f"{asked.call} follows no paper; cite the methods that it is given")
    return asked.paper.every
