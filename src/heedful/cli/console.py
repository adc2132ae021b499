"""What the verbs share: the console, stopping, and writing the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Console

if TYPE_CHECKING:
    from heedful.cli.progress import Bars
    from heedful.diagnosis.workers import Ray

console = Console(highlight=False, soft_wrap=True, emoji=False)  # "tiny:llama:" has none


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
