"""`heedful lab`: what becomes of a model that is trained with something else than softmax."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from heedful.cli.console import require_page, stopping, tell, write_page
from heedful.cli.progress import Bars

STAGES = {"steps": ("training", "steps")}


def lab(
    mechanisms: Annotated[
        str,
        typer.Option(help="Parted by commas, joined by |, as in 'mala,clippedsoftmax|gatedheads'; eight if left out."),
    ] = "",
    kind: Annotated[str, typer.Option(help="What is trained: lm, vit, seq2seq, pool or sinks.")] = "lm",
    seeds: Annotated[int, typer.Option(help="Trainings of each.")] = 1,
    tokens: Annotated[int | None, typer.Option(help="The budget of each training.")] = None,
    out: Annotated[Path | None, typer.Option(help="Keep what is trained here, and go on here if stopped.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results for machines.")] = False,
    page: Annotated[bool, typer.Option(help="Write the page.")] = True,
) -> None:
    """Train softmax and every mechanism on the same tiny models, data and budget; tell what each wins and costs."""
    from heedful.catalogue import parted
    from heedful.laboratory.lab import lab as run

    if page:
        require_page()
    bars = Bars(STAGES)
    with stopping(bars, out):
        found = run(parted(mechanisms) or None, kind, seeds=seeds, tokens=tokens, out=out, progress=bars)
    where = write_page(found, "lab", kind, out) if page else None
    if as_json:
        told = {"facts": found.facts, "results": [asdict(r) for r in found.results], "page": where and str(where)}
        typer.echo(json.dumps(told | {"refused": [asdict(r) for r in found.refused]}, indent=1))
    else:
        tell(found, where)
