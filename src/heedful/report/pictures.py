"""Figures by name in notebooks, and as files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from heedful.core.errors import HeedfulError, first_line, nearest
from heedful.core.figures import Figure
from heedful.report.plots import draw

if TYPE_CHECKING:
    import plotly.graph_objects as go


def export(drawn: go.Figure, path: str | Path, width: int = 900, height: int = 480, scale: float = 2) -> Path:
    """A static picture; the ending chooses between png, svg, pdf, jpg and webp."""
    path = Path(path)
    try:
        drawn.write_image(path, width=width, height=height, scale=scale)
    except (ValueError, RuntimeError, ImportError) as error:
        raise HeedfulError(
            f"{path.name} was not written: {first_line(error)} A picture needs the package kaleido and Chrome or "
            f"Chromium on this machine (pip install 'heedful[page]'; BROWSER_PATH names a browser in an "
            f"unusual place). Without them figure.write_html({path.with_suffix('.html').name!r}) works."
        ) from error
    return path


class Plots:
    """Figures by their keys: `profile.plot.sinks()` is a plotly figure. `dir(profile.plot)` names all."""

    def __init__(self, figures: Iterable[Figure]) -> None:
        self._figures = {figure.key: figure for figure in figures}

    def __getattr__(self, key: str) -> Callable[..., go.Figure]:
        figures: dict[str, Figure] = self.__dict__.get("_figures", {})
        if key.startswith("__") or key not in figures:
            near = nearest(key, figures) or f" There are {', '.join(figures) or 'none'}."
            raise AttributeError(f"no figure named {key!r} here.{near}")
        return lambda **options: draw(figures[key], **options)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._figures]

    def __repr__(self) -> str:
        return f"Plots({', '.join(self._figures)})"

    def export(self, folder: str | Path, ending: str = "png") -> list[Path]:
        """Every figure as a picture in a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return [export(draw(f), folder / f"{key}.{ending}") for key, f in self._figures.items()]
