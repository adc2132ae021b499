"""Joins the verbs into one program."""

from __future__ import annotations

from typing import Annotated

import typer

import heedful
from heedful.cli import cite, compare, demo, diagnose, doctor, explain, lab, laws, methods, new, show

app = typer.Typer(
    help="Everything people do to attention in a transformer: look at it, explain it, edit it, replace it, cheapen it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"heedful {heedful.__version__}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("diagnose", context_settings={"allow_extra_args": True})(diagnose.diagnose)
app.command("compare")(compare.compare)
app.command("lab")(lab.lab)
app.command("methods")(methods.methods)
app.add_typer(_new := typer.Typer(help="Write the beginning of something.", no_args_is_help=True), name="new")
_new.command("method")(new.method)
_new.callback()(lambda: None)  # so that `method` stays a word of its own
app.command("show")(show.show)
app.command("explain")(explain.explain_backends)
app.command("check")(laws.check_laws)
app.command("cite")(cite.cite)
app.command("doctor")(doctor.doctor)
