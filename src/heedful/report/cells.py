"""Figures as plain HTML, for notebooks: no script, nothing from outside, and still there when the notebook is saved."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from torch import Tensor

from heedful.core.figures import Grid, HeadMap, Matrix, head_name, percent
from heedful.report.colours import SCALE, SIGNED

CELL = "min-width:14px;height:14px;padding:0 2px;text-align:center;font-size:11px;white-space:nowrap;border:0"
NAME = "padding:0 6px;font-size:11px;font-weight:400;color:#62656f;text-align:right;white-space:nowrap;border:0"
TONES = {"good": "#d3ebe7", "bad": "#fbdccf"}


def written(value: float, unit: str) -> str:
    return "none" if value != value else percent(value) if unit == "share" else f"{value:.3g}"


def heat(figure: HeadMap | Grid) -> str:
    """A map as a table of coloured cells; each says its number when it is pointed at."""
    values = figure.values.detach().double().cpu()
    if isinstance(figure, HeadMap):
        values = values.T  # layers from left to right, as everywhere
        columns, rows = [str(layer) for layer in figure.layers], [str(head) for head in range(len(values))]
        names = [[f"head {head_name(layer, head)}" for layer in figure.layers] for head in range(len(values))]
        text = None
    else:
        columns, rows, text = list(figure.columns), list(figure.rows), figure.text
        names = [[f"{figure.row_label} {row}, {figure.column_label} {column}" for column in columns] for row in rows]
    colours = _colours(values)
    lines = []
    for i, row in enumerate(rows):
        cells = "".join(
            f'<td style="{CELL};background:{colours[i][j]};color:{_ink(colours[i][j])}" title="'
            f'{escape(f"{names[i][j]}: {written(float(values[i, j]), figure.unit)}")}">'
            f"{escape(text[i][j]) if text is not None else ''}</td>"
            for j in range(len(columns))
        )
        lines.append(f'<tr><th style="{NAME}">{escape(row)}</th>{cells}</tr>')
    every = max(1, len(columns) // 16) if all(name.isdigit() for name in columns) else 1
    turned = "" if every > 1 or all(len(name) < 3 for name in columns) else ";writing-mode:vertical-rl;text-align:right"
    head = "".join(
        f'<th style="{NAME}{turned}">{escape(x) if i % every == 0 else ""}</th>' for i, x in enumerate(columns)
    )
    style = "border-collapse:separate;border-spacing:1px;width:auto"
    table = f'<table style="{style}"><tr><th></th>{head}</tr>{"".join(lines)}</table>'
    return f"<p><b>{escape(figure.title)}</b><br>{escape(figure.what)}</p>{table}"


def _colours(values: Tensor) -> list[list[str]]:
    """The page's colours on light ground: signed ones where anything lies below zero, white at zero."""
    known = values[values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    steps: Sequence[str] = SCALE
    if low < 0:
        steps, high = SIGNED[False], max(-low, high)
        low = -high
    else:
        low = min(low, 0.0)
    place = ((values - low) / ((high - low) or 1.0)).nan_to_num(-1.0)
    return [[_mixed(steps, x) if x >= 0 else "#e3e3e0" for x in row] for row in place.tolist()]


def _mixed(steps: Sequence[str], place: float) -> str:
    at = min(place, 1.0) * (len(steps) - 1)
    below = min(int(at), len(steps) - 2)
    pair = (tuple(int(steps[below + i][j : j + 2], 16) for j in (1, 3, 5)) for i in (0, 1))
    return "#" + "".join(f"{round(a + (b - a) * (at - below)):02x}" for a, b in zip(*pair, strict=True))


def _ink(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#1d1f26" if 0.3 * red + 0.59 * green + 0.11 * blue > 130 else "#ffffff"


def matrix(table: Matrix) -> str:
    """A comparison's matrix."""
    style = "text-align:right;padding:2px 10px;white-space:nowrap"
    head = "".join(
        f'<th style="{style}">{escape(name)}<br><small>{escape(unit)}</small></th>' for name, unit in table.columns
    )
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        + "".join(
            f'<td style="{style};background:{TONES.get(cell.tone, "none")}">{escape(cell.text)}'
            f"<br><small>{escape(cell.detail)}</small></td>"
            for cell in cells
        )
        + "</tr>"
        for name, cells in table.rows
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"
