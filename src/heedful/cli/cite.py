"""`heedful cite METHOD...`: BibTeX."""

from __future__ import annotations

from typing import Annotated

import typer

from heedful.catalogue import find


def cite(names: Annotated[list[str], typer.Argument(metavar="METHOD...", help="Names or paper ids.")]) -> None:
    """Print the BibTeX of the papers behind methods."""
    typer.echo("\n\n".join(dict.fromkeys(find(name).paper.bibtex() for name in names)))
