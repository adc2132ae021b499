"""Curves and grids on the page: bands behind lines, four that are shown, the others folded; labels with room."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from heedful.core.figures import Curves, Grid, Scatter

pytest.importorskip("plotly", reason="plotly is not installed (pip install 'heedful[page]')")
pytest.importorskip("jinja2", reason="jinja2 is not installed (pip install 'heedful[page]')")

from heedful.report import data, page
from heedful.report.plots import curves, grid, scatter


def banded(**what: Any) -> Curves:
    lines = {"all": torch.tensor([0.5, 0.2, 0.1]), "some": torch.tensor([0.3, 0.2, 0.4])}
    low, high = torch.tensor([0.4, 0.0, math.nan]), torch.tensor([0.6, 0.3, math.nan])
    how = {"log_y": True, "bands": {"some": (low, high)}, "band": "the lowest to the highest"} | what
    return Curves("spread", "Spread", "By place.", [1, 2, 4], lines, "place", "share", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(("many", "named"), [(2, 2), (9, 9), (10, 10), (11, 2)])
def test_lines_are_named_up_to_as_many_as_there_are_colours(many: int, named: int):
    lines = {f"method {n}": torch.tensor([1.0, n]) for n in range(many)}
    drawn = curves(Curves("learning", "Learning", "", [1, 2], lines, "tokens", "loss"))
    in_legend = [trace for trace in drawn.data if trace.showlegend is not False]
    assert len(in_legend) == named
    assert len({trace.line.color for trace in in_legend}) == named
    if named > 6:  # 19 pixels a name on a phone, and as much room again for the lines
        assert drawn.layout.height >= 2 * 19 * named


def test_a_band_lies_behind_its_line_where_both_edges_are_known():
    low, high, *lines = curves(banded()).data
    assert [trace.name for trace in lines] == ["all", "some"]
    assert (low.meta, high.meta, high.fill) == ({"band": "some"}, {"band": "some"}, "tonexty")
    assert list(high.x) == [1, 2]
    assert list(high.y) == pytest.approx([0.6, 0.3])
    assert list(low.y) == pytest.approx([0.4, 0.1])  # nothing is zero on a logarithm: the least number that is shown
    assert list(curves(banded(log_y=False)).data[0].y) == pytest.approx([0.4, 0.0])
    assert low.line.color == lines[1].line.color != lines[0].line.color


def test_four_curves_are_shown_and_what_shades_mean_is_said_once():
    figures = [banded(), *(banded(folded=i == 0, band=str(i)) for i in range(5))]
    kinds = page.by_kind([data.figure(f, "") for f in figures])
    found = page.along(kinds)
    assert [f["shaded"][8:-1] for f in found["shown"]] == ["the lowest to the highest", "1", "2", "3"]
    assert [f["shaded"][8:-1] for f in found["folded"]] == ["0", "4"]
    assert found["shaded"] == ""
    assert page.along(page.by_kind([data.figure(banded(), "")] * 2))["shaded"] == "Shaded: the lowest to the highest."


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([f"{0.02 * i:.2f}" for i in range(1400)], ["0.00", "5.00", "10.00", "15.00", "20.00", "25.00"]),
        ([f"{0.02 * i:.2f}" for i in range(50)], [f"{0.1 * i:.2f}" for i in range(10)]),
        ([str(i) for i in range(30)], [str(2 * i) for i in range(15)]),
        ([str(i) for i in range(48)], [str(5 * i) for i in range(10)]),
        (["3"], ["3"]),
        (["a", "b"], None),
    ],
)
def test_numbers_below_a_grid_are_round_and_do_not_run_into_each_other(names: list[str], labels: list[str] | None):
    figure = Grid("g", "G", "", torch.zeros(2, len(names)), ["x", "y"], names, "row", "column")
    axis = grid(figure).layout.xaxis
    assert axis.type == "category"
    assert (None if axis.dtick is None else names[:: axis.dtick]) == labels


def test_few_places_are_the_ticks():
    lines = {"a": torch.tensor([1.0, 3.0, 9.0])}
    axis = curves(Curves("c", "C", "", [1, 4, 16], lines, "batch", "tokens a second", log_x=True)).layout.xaxis
    assert (axis.type, list(axis.tickvals), list(axis.ticktext)) == ("log", [1, 4, 16], ["1", "4", "16"])
    longer = Curves("c", "C", "", list(range(9)), {"a": torch.arange(9.0)}, "layer", "share")
    assert curves(longer).layout.xaxis.tickvals is None


@pytest.mark.parametrize(("end", "named"), [(0.1, {"one", "two", "far"}), (2.0, {"one", "far"})])
def test_names_stand_apart_on_the_axis_that_intervals_make_long(end: float, named: set[str]):
    points = {"one": (1.0, 0.0, -end, end), "two": (1.01, -0.05, math.nan, math.nan), "far": (2.0, -0.1, -0.1, -0.1)}
    drawn = scatter(Scatter("s", "S", "", points, "cost", "quality"))
    assert {text for trace in drawn.data for text in trace.text or () if text} == named
