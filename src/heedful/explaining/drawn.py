"""What answers have in common that one figure shows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from heedful.core.figures import Grid, HeadMap, printed

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Drawn(ABC):
    """An answer that a notebook shows as its figure."""

    @property
    @abstractmethod
    def figure(self) -> Grid | HeadMap:
        """What is drawn, as a value."""

    def plot(self) -> go.Figure:
        """The figure, as plotly draws it."""
        from heedful.report.plots import draw

        return draw(self.figure)

    def _repr_html_(self) -> str:
        from heedful.report.cells import heat

        return heat(self.figure)


class Told(Drawn, ABC):
    """One that a notebook shows as its text, and the figure below."""

    def _repr_html_(self) -> str:
        return printed(self) + super()._repr_html_()
