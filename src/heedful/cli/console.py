"""What the verbs share: the console, reading methods from the command line, stopping, and writing the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console

from heedful.catalogue import find
from heedful.core.errors import FieldError
from heedful.core.kinds import Weights
from heedful.core.method import CatalogueEntry, Method, Stack
from heedful.core.reading import named, written

if TYPE_CHECKING:
    from heedful.cli.progress import Bars
    from heedful.diagnosis.workers import Ray
    from heedful.text_models import Contender

console = Console(highlight=False, soft_wrap=True)


def parted(text: str, by: str = ",") -> list[str]:
    """What stands between commas, but for those within brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == by and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def entry_from(text: str) -> CatalogueEntry:
    """A method from its name, with settings if they follow: `SinkWindow`, `SinkWindow(sinks=2, window=64)`."""
    kind = find(named(text))
    return written(text, kind, kind.example()) if "(" in text else kind.example()


def stack_from(text: str) -> Contender:
    """What can be tried on a model: one step, or methods joined by `|`; without settings, with the defaults."""
    entries = [entry_from(part if "(" in part else part + "()") for part in parted(text, "|")]
    if len(entries) == 1 and not isinstance(entries[0], Weights):
        return entries[0]  # type: ignore[return-value]  # every other kind of entry is one
    for entry in entries:
        if not isinstance(entry, Method):
            rule = f"{type(entry).__name__} is {entry.kind}, which cannot be joined"
            raise FieldError("compare", "methods", text, rule, "SinkWindow | TempScale")
    return Stack(tuple(entry for entry in entries if isinstance(entry, Method)))


def workers_from(workers: int | None, ray: str) -> Ray | None:
    """The workers that `--workers` and `--ray` ask for; None: this process."""
    from heedful.diagnosis.workers import Ray

    return Ray(2 if workers is None else workers, ray) if ray or workers is not None else None


def require_page() -> None:
    """Say what the page needs before the long run, not after."""
    from heedful.report.plots import MissingPackage

    for package in ("plotly", "jinja2"):
        if find_spec(package) is None:
            raise MissingPackage(package)


class Paged(Protocol):
    """What a long verb found."""

    def page(self, path: str | Path) -> Path: ...


@contextmanager
def stopping(bars: Bars, out: Path | None) -> Iterator[None]:
    """Show the bars; where somebody stops the run, say how it goes on."""
    try:
        with bars.progress:
            yield
    except KeyboardInterrupt:
        bars.console.print("stopped" + ("; the same command goes on from here" if out else ""))
        raise typer.Exit(130) from None


def write_page(found: Paged, verb: str, name: str, out: Path | None) -> Path:
    """Write the page into the folder of the records, or here under the model's name; where it lies."""
    from heedful.core.files import writing

    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    target = Path(f"{verb}-{plain}.html") if out is None else out / "page.html"
    with writing(target):
        return found.page(target).resolve()


def tell(found: Paged, page: Path | None) -> None:
    """Print what was found, and where its page lies."""
    console.print(str(found), markup=False)
    if page is not None:
        console.print(f"\nThe page: {page}", markup=False)
