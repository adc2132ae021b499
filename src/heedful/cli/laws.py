"""`heedful check METHOD`: every law on one method."""

from __future__ import annotations

from typing import Annotated

import typer

from heedful.cli.console import console


def check_laws(
    name: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="A name, with settings if you like, 'ACT(beta=0.2)', or a file of your own, 'mine.py'.",
        ),
    ],
) -> None:
    """Try every law on a method; exit code 1 when one is broken."""
    from heedful.catalogue import entry_from, find
    from heedful.conformance import check, laws

    with console.status("trying the laws"):
        report = check(entry_from(name) if "(" in name else find(name))
    texts = {law.name: law.text for law in laws().values()}
    for verdict in report:
        colour = {"kept": "green", "broken": "red", "does not apply": "dim"}[verdict.outcome]
        console.print(f"[{colour}]{verdict.outcome:<14}[/] {texts[verdict.law]}")
        if verdict.reason:
            console.print(f"{'':15}{verdict.reason}", style=colour, markup=False)
    if not report.ok:
        raise typer.Exit(1)
