"""Figures as plotly figures: one function for each kind of `Figure`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heedful.core.errors import HeedfulError, nearest
from heedful.core.figures import Curves, Figure, Grid, HeadMap, Intervals, Listing, Lit, Scatter
from heedful.report.colours import CLOUD, LINES, ORDERED, ROLES, ZERO, template
from heedful.report.lit import side_by_side

if TYPE_CHECKING:
    import plotly.graph_objects as go

# How a number of each unit is written, in d3's language, which plotly speaks.
WRITTEN = {"share": ".1~%", "nats": ".3~f", "tokens": ",.3~r"}
HEAD = re.compile(r"\d+\.\d+")  # what `head_name` makes
ROOM, TINY = 64, 1e-6  # letters that stand side by side below a plot; what rounding leaves of a ratio
FEW = 6  # places along an axis up to which each has a tick
POINTS, NUMBERS = 600, 48_000  # in a line, and in the lines of one figure: a page stays light, a peak stays


class MissingPackage(HeedfulError, ImportError):
    """Plots and pages need an optional package."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed, and pages and plots need it: pip install 'heedful[page]'")


def _plotly() -> Any:
    try:
        import plotly.graph_objects as objects
    except ImportError as error:
        raise MissingPackage("plotly") from error
    return objects


def _array(x: Tensor) -> Any:
    return x.detach().to("cpu", torch.float32).numpy()


def written(unit: str) -> str:
    """The d3 format for numbers of that unit."""
    return WRITTEN.get(unit, ".3~g")


def suffix(unit: str) -> str:
    return f" {unit}" if unit in ("nats", "tokens") else ""


def _limits(figure: HeadMap) -> tuple[float | None, float | None]:
    """Ends of the colour scale; a map of shares begins at 0, so that maps can be compared."""
    low = 0.0 if figure.low is None and figure.unit == "share" else figure.low
    known = figure.values[torch.isfinite(figure.values)]
    if low is None and figure.high is None and len(known) and float(known.min()) < 0:
        size = float(known.abs().max())
        return -size, size  # zero in the middle, where a signed scale has none of its colours
    if low is not None and figure.high is None and len(known):
        return low, max(float(known.max()), low + 1e-9)  # plotly takes both ends or none
    return (low, figure.high) if low is not None and figure.high is not None else (None, None)


def head_map(figure: HeadMap, sort: bool = False) -> go.Figure:
    """Layers from left to right, heads from top to bottom; `sort` puts each layer's strongest head on top."""
    values = figure.values.detach().float()
    order = values.nan_to_num(-math.inf).argsort(dim=1, descending=True, stable=True)
    if not sort:
        order = torch.arange(values.shape[1]).expand(values.shape)
    low, high = _limits(figure)
    number = written(figure.unit)
    heat = _plotly().Heatmap(
        z=_array(values.gather(1, order).T),
        x=[str(layer) for layer in figure.layers],
        y0=int(sort),  # ranks are counted from 1
        customdata=order.T.to(torch.int16).numpy(),
        zmin=low,
        zmax=high,
        autocolorscale=(low is not None and low < 0) or None,
        xgap=1,
        ygap=1,
        colorbar={"tickformat": number},
        hovertemplate=f"head %{{x}}.%{{customdata}}<br><b>%{{z:{number}}}</b>{suffix(figure.unit)}<extra></extra>",
        hoverongaps=False,
    )
    layout = {
        "xaxis": {"title": {"text": "layer"}, "showgrid": False, **_names(figure.layers)},
        "yaxis": {"title": {"text": "rank" if sort else "head"}, "autorange": "reversed", "showgrid": False},
    }
    return _finish(figure, [heat], layout)


def grid(figure: Grid) -> go.Figure:
    """A matrix with named rows and columns."""
    values = figure.values.detach().float()
    number = written(figure.unit)
    shown = values.clamp(min=1e-30).log10().masked_fill(values <= 0, math.nan) if figure.log else values
    bar: dict[str, Any] = {"tickformat": number}
    known = shown[torch.isfinite(shown)]
    if figure.log and len(known):
        decades = list(range(math.floor(float(known.min())), math.ceil(float(known.max())) + 1))
        bar = {"tickvals": decades, "ticktext": [f"{10.0**d:g}" for d in decades]}
    size = float(known.abs().max()) if len(known) and not figure.log and float(known.min()) < 0 else None
    heat = _plotly().Heatmap(
        z=_array(shown),
        zmin=size and -size,  # zero in the middle, where a signed scale has none of its colours
        zmax=size,
        autocolorscale=size is not None or None,
        x=list(figure.columns),
        y=list(figure.rows),
        customdata=_array(values) if figure.log else None,
        colorbar=bar,
        text=figure.text,
        texttemplate=None if figure.text is None else "%{text}",
        hovertemplate=f"{figure.row_label} %{{y}}, {figure.column_label} %{{x}}<br>"
        f"<b>%{{{'customdata' if figure.log else 'z'}:{number}}}</b>{suffix(figure.unit)}<extra></extra>",
        hoverongaps=False,
    )
    layout = {
        "xaxis": {"title": {"text": figure.column_label}, "showgrid": False, **_names(figure.columns)},
        "yaxis": {"title": {"text": figure.row_label}, "type": "category", "autorange": "reversed", "showgrid": False},
    }
    return _finish(figure, [heat], layout)


def _thin(x: Tensor, lines: Tensor, most: int, log: bool) -> Tensor:
    """Which points to keep, about `most`: the ends, and the highest and lowest of each stretch of the axis."""
    n = len(x)
    if n <= most:
        return torch.arange(n)
    along = x.clamp(min=float(x[x > 0].min())).log() if log and (x > 0).any() else x
    stretch = ((along - along.min()) / (along.max() - along.min()).clamp(min=1e-30) * (most // 2 - 1)).round().long()
    top, low = lines.nan_to_num(-math.inf).amax(0), lines.nan_to_num(math.inf).amin(0)
    kept = [torch.tensor([0, n - 1])]
    for part in stretch.unique():
        at = (stretch == part).nonzero()[:, 0]
        kept.append(torch.stack([at[top[at].argmax()], at[low[at].argmin()]]))
    return torch.cat(kept).unique()


def curves(figure: Curves, picked: Sequence[str] = ()) -> go.Figure:
    """Lines over one axis. Those of single heads make a grey cloud, from which `picked` heads, "14.3", stand out."""
    objects = _plotly()
    names = list(figure.lines)
    for name in picked:
        if name not in names:
            raise HeedfulError(f"{figure.key} has no line {name!r}.{nearest(name, names)}")
    values = torch.stack([figure.lines[n].detach().to("cpu", torch.float32) for n in names]) if names else None
    traces: list[Any] = []
    if values is not None:
        x = torch.tensor([float(v) for v in figure.x])
        kept = _thin(x, values, min(POINTS, max(24, NUMBERS // len(names))), figure.log_x)
        x, values = x[kept], values[:, kept]
        heads = [i for i, name in enumerate(names) if HEAD.fullmatch(name)]
        others = [i for i in range(len(names)) if i not in set(heads)]
        traces += _bands(figure, x, kept, values)
        if heads:
            traces.append(_cloud(x, values[heads], [names[i] for i in heads]))
            if not others:
                middle = values[heads].nanmedian(0).values
                traces.append(objects.Scatter(x=_array(x), y=_array(middle), name="median head", mode="lines"))
        for place, i in enumerate(others):
            line = {"color": ROLES[i % len(ROLES)]}
            traces.append(objects.Scatter(x=_array(x), y=_array(values[i]), name=names[i], mode="lines", line=line))
            if len(others) > len(ROLES):
                shade = ORDERED[round(place / (len(others) - 1) * (len(ORDERED) - 1))]
                traces[-1].update(line={"color": shade, "width": 1.4}, showlegend=place in (0, len(others) - 1))
        for name in picked:
            y = _array(values[names.index(name)])
            traces.append(objects.Scatter(x=_array(x), y=y, name=f"head {name}", mode="lines", line={"width": 2.6}))
    if len(figure.x) == 1:  # a line of one point shows nothing
        for trace in traces:
            trace.update(mode="markers")
    few = {"tickvals": list(figure.x), "ticktext": [f"{v:g}" for v in figure.x]} if len(figure.x) <= FEW else {}
    along = _scale(figure.log_x, torch.tensor([float(v) for v in figure.x])) | few
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": figure.x_label}, **along},
        "yaxis": {"title": {"text": figure.y_label}, **_scale(figure.log_y, values)},
        "hovermode": "closest",
        "legend": {"traceorder": "normal"},
    }
    if len(LINES) < (named := sum(trace.showlegend is not False for trace in traces)):
        layout["height"] = 300 + 14 * named  # a name a line, on a phone
    return _finish(figure, traces, layout)


def _bands(figure: Curves, x: Tensor, kept: Tensor, values: Tensor) -> list[Any]:
    """The room between two edges of a line, in its colour, where both are known."""
    traces = []
    seen = torch.cat([values.flatten(), *(y.flatten().cpu() for pair in figure.bands.values() for y in pair)])
    seen = seen[(seen > 0) & seen.isfinite()]
    least = float(seen.min()) if figure.log_y and len(seen) else -math.inf  # zero has no place on a logarithm
    for i, name in enumerate(figure.lines):
        if name not in figure.bands:
            continue
        colour = ROLES[i % len(ROLES)]
        shade = ", ".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))
        edges = torch.stack([y.detach().to("cpu", torch.float32)[kept] for y in figure.bands[name]])
        known = edges.isfinite().all(0)
        for edge, y in zip(("lower", "upper"), edges[:, known].clamp(min=least), strict=True):
            trace = _plotly().Scatter(x=_array(x[known]), y=_array(y), name=f"{name}, {edge} edge", mode="lines")
            trace.update(line={"width": 0, "color": colour}, fillcolor=f"rgba({shade}, 0.18)", hoverinfo="skip")
            trace.update(fill="tonexty" if edge == "upper" else None, showlegend=False, meta={"band": name})
            traces.append(trace)
    return traces


def _names(names: Sequence[object]) -> dict[str, Any]:
    """An axis of names; of numbers, such as layers or seconds, as many as there is room for, at round ones."""
    told = [str(name) for name in names]
    if not all(re.fullmatch(r"[-+]?\d*\.?\d+", name) for name in told):
        return {"type": "category"}
    every = math.ceil(len(told) * (2 + max(map(len, told), default=0)) / ROOM)
    step = (float(told[-1]) - float(told[0])) / (len(told) - 1) if len(told) > 1 else 0.0
    if every > 1 and step > 0:
        decade = 10.0 ** math.floor(math.log10(every * step))
        apart = next(n * decade for n in (1, 2, 5, 10) if n * decade >= (1 - TINY) * every * step)
        every = round(apart / step)
    return {"type": "category", "tickangle": 0, "dtick": every}


def _scale(log: bool, shown: Tensor | None) -> dict[str, Any]:
    """A straight axis, or one of decades: a label at each power of ten once there are enough of them."""
    if not log or shown is None:
        return {"type": "log" if log else "linear"}
    known = shown[torch.isfinite(shown) & (shown > 0)]
    decades = float((known.max() / known.min()).log10()) if len(known) else 0.0
    return {"type": "log", "dtick": math.ceil(decades / 5)} if decades >= 2 else {"type": "log"}


def _cloud(x: Tensor, lines: Tensor, names: list[str]) -> Any:
    """All heads as one trace with a gap behind each, which draws hundreds of lines at once."""
    gap = lines.new_full((len(lines), 1), math.nan)
    y = torch.cat([lines, gap], 1).flatten()
    along = torch.cat([x.expand(len(lines), -1), gap], 1).flatten()
    return _plotly().Scatter(
        x=_array(along),
        y=_array(y),
        mode="lines",
        name="every head",
        line={"color": CLOUD, "width": 0.6},
        hoverinfo="skip",
        showlegend=False,
        meta={"heads": names, "points": len(x)},
    )


def listing(figure: Listing) -> go.Figure:
    """A table; numbers stand to the right."""
    columns = [[_cell(row[i]) for row in figure.rows] for i in range(len(figure.columns))]
    numeric = [all(isinstance(row[i], (int, float)) for row in figure.rows) for i in range(len(figure.columns))]
    align = ["right" if n else "left" for n in numeric]
    table = _plotly().Table(header={"values": list(figure.columns), "align": align}, cells={"values": columns})
    table.update(cells={"align": align})
    return _finish(figure, [table], {})


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finish(figure: Figure, traces: list[Any], layout: dict[str, Any]) -> go.Figure:
    """With a title, and below it the sentence that says how to read the figure."""
    what = wrap(figure.what, 100)
    title = {"text": figure.title, "subtitle": {"text": "<br>".join(what)}, "y": 1, "yref": "container"}
    layout["title"] = title | {"yanchor": "top", "pad": {"t": 20}}
    layout["margin"] = {"t": 72 + 17 * len(what), "l": 24, "r": 24, "b": 24}
    return _plotly().Figure(traces, layout)


def intervals(figure: Intervals) -> go.Figure:
    """Names from top to bottom, and below one another for each group a dot with its interval."""
    objects = _plotly()
    many, places = len(figure.groups), torch.arange(len(figure.names), dtype=torch.float32)
    traces = []
    for number, (name, values) in enumerate(figure.groups.items()):
        middle, low, high = values.float().unbind(1)
        bar = {"type": "data", "symmetric": False, "array": _array(high - middle), "arrayminus": _array(middle - low)}
        traces.append(
            objects.Scatter(
                x=_array(middle),
                y=_array(places + (number - (many - 1) / 2) * 0.7 / many),
                text=list(figure.names),
                error_x=bar | {"thickness": 1.4, "width": 3},
                mode="markers",
                name=name,
                marker={"size": 8},
                customdata=torch.stack([low, high], 1).numpy(),
                hovertemplate=f"%{{text}}, {name}<br><b>%{{x:+.3~f}}</b> {figure.unit}, "
                "%{customdata[0]:+.3~f} to %{customdata[1]:+.3~f}<extra></extra>",
            )
        )
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": figure.label}},
        "yaxis": {
            "tickvals": places.tolist(),
            "ticktext": list(figure.names),
            "range": [len(figure.names) - 0.5, -0.5],
            "showgrid": False,
        },
        "height": 110 + len(figure.names) * (16 + 12 * many),
        "hovermode": "closest",
    }
    if figure.zero:
        mark = {"x": 0, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top", "text": figure.zero}
        mark |= {"showarrow": False, "font": {"color": ZERO, "size": 11}}
        line = {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [line | {"line": {"width": 1.2, "color": ZERO}}]
        layout["annotations"] = [mark]
    return _finish(figure, traces, layout)


def scatter(figure: Scatter) -> go.Figure:
    """Names at their cost and quality, with intervals, and a line through those that none beats."""
    objects = _plotly()
    best = figure.frontier
    step = {"color": CLOUD, "width": 2, "shape": "hv"}
    x, y = ([figure.points[name][i] for name in best] for i in (0, 1))
    traces = [objects.Scatter(x=x, y=y, mode="lines", line=step, hoverinfo="skip", showlegend=False)]
    for names in figure.joined:
        x, y = ([figure.points[name][i] for name in names] for i in (0, 1))
        thin = {"color": ZERO, "width": 1, "dash": "dot"}
        traces.append(objects.Scatter(x=x, y=y, mode="lines", line=thin, hoverinfo="skip", showlegend=False))
    shown = _apart(figure, best)
    for ending, symbol, colour in (("on the front", "circle", LINES[0]), ("not on it", "circle-open", LINES[3])):
        names = [name for name in figure.points if (name in best) == (symbol == "circle")]
        if not names:
            continue
        x, y, low, high = (list(values) for values in zip(*(figure.points[name] for name in names), strict=True))
        bar = {"type": "data", "symmetric": False, "thickness": 1, "width": 0}
        for side, ends in (("array", high), ("arrayminus", low)):
            bar[side] = [None if math.isnan(end) else abs(end - v) for end, v in zip(ends, y, strict=True)]
        words = [name if name in shown else "" for name in names]
        trace = objects.Scatter(x=x, y=y, text=words, mode="markers+text", name=ending, error_y=bar, cliponaxis=False)
        trace.update(
            marker={"size": 9, "symbol": symbol, "color": colour}, textfont={"size": 11}, textposition="top center"
        )
        trace.update(customdata=names, hovertemplate="%{customdata}<br>%{x:.3~f}, <b>%{y:+.3~f}</b><extra></extra>")
        traces.append(trace)
    ends = [at[0] for at in figure.points.values()]
    room = 0.12 * (max(ends) - min(ends)) or 0.1  # for the names of the outermost
    layout = {
        "xaxis": {"title": {"text": figure.x_label}, "range": [min(ends) - room, max(ends) + room]},
        "yaxis": {"title": {"text": figure.y_label}},
        "hovermode": "closest",
    }
    return _finish(figure, traces, layout)


def _reach(values: Sequence[float]) -> float:
    """How much of an axis values take, with what is no number left out."""
    known = [x for x in values if not math.isnan(x)]
    return max(known) - min(known) or 1.0


def _apart(figure: Scatter, best: Sequence[str]) -> list[str]:
    """The points whose names have room beside the others', the best ones first; the rest are named on hover."""
    at = figure.points
    wide, high = (_reach([x for v in at.values() for x in part(v)]) for part in (lambda v: v[:1], lambda v: v[1:]))
    out: list[str] = []
    for name in (*best, *(n for n in at if n not in best)):
        if all(abs(at[name][0] - at[o][0]) > 0.16 * wide or abs(at[name][1] - at[o][1]) > 0.07 * high for o in out):
            out.append(name)
    return out


DRAW: dict[type[Figure], Callable[..., Any]] = {
    HeadMap: head_map,
    Grid: grid,
    Curves: curves,
    Listing: listing,
    Lit: side_by_side,
    Intervals: intervals,
    Scatter: scatter,
}


def bare(figure: Figure, **options: Any) -> go.Figure:
    """The figure in nobody's colours, for a page that has its own."""
    for kind, function in DRAW.items():
        if isinstance(figure, kind):
            return function(figure, **options)
    known = ", ".join(kind.__name__ for kind in DRAW)
    raise HeedfulError(f"no plot for a {type(figure).__name__}: there are plots for {known}")


def draw(figure: Figure, **options: Any) -> go.Figure:
    """The figure as plotly draws it; notebooks show it by itself."""
    drawn = bare(figure, **options)
    drawn.layout.template = template(dark=False)
    return drawn
