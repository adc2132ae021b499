"""`heedful cite METHOD...`: BibTeX."""

from __future__ import annotations

from typing import Annotated

import typer

from heedful.catalogue import find, parted
from heedful.core.reading import name_in


def cite(
    names: Annotated[list[str], typer.Argument(metavar="METHOD...", help="Names, paper ids, or stacks as elsewhere.")],
) -> None:
    """Print the BibTeX of the papers behind methods."""
    asked = (name_in(one) for name in names for one in parted(name, "|") or [name])
    papers = (paper for name in asked for paper in find(name).paper.every)
    typer.echo("\n\n".join(dict.fromkeys(paper.bibtex() for paper in papers)))
