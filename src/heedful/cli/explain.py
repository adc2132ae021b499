"""`heedful explain METHOD`: which backend serves it, and why not the others."""

from __future__ import annotations

from typing import Annotated

import typer

from heedful.cli.console import console
from heedful.core.errors import DefinitionError


def explain_backends(
    names: Annotated[
        list[str], typer.Argument(metavar="METHOD...", help="One method or several, joined in this order or by |.")
    ],
    softcap: Annotated[bool, typer.Option(help="As in a model that caps its scores.")] = False,
    sink: Annotated[bool, typer.Option(help="As in a model with learned sink logits.")] = False,
) -> None:
    """Say how a method or a stack would be computed, with every reason against the other ways."""
    from heedful.catalogue import joined
    from heedful.core.method import Method, Stack
    from heedful.engine.select import explain

    parts = [part for name in names for part in joined(name, "heedful explain", "METHOD")]
    for part in parts:
        if not isinstance(part, Method):
            raise DefinitionError(f"{type(part).__name__} is {part.kind}, which needs no backend; name a method")
    console.print(
        str(explain(Stack(tuple(p for p in parts if isinstance(p, Method))), softcap=softcap, sink=sink)), markup=False
    )
