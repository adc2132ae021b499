"""`heedful cite METHOD...`: BibTeX."""

from __future__ import annotations

from typing import Annotated

import typer

from heedful.catalogue import find


def cite(names: Annotated[list[str], typer.Argument(metavar="METHOD...", help="Names or paper ids.")]) -> None:
    """Print the BibTeX of the papers behind methods."""
    papers = (paper for name in names for paper in find(name).paper.every)
    typer.echo("\n\n".join(dict.fromkeys(paper.bibtex() for paper in papers)))
