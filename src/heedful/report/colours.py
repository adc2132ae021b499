"""The colours of pages and plots: one scale, one accent, and lines that show on light and on dark ground."""

from __future__ import annotations

from typing import Any

# Nine steps of equal OKLab lightness from paper to ink. On dark ground it is turned round, so that the ground is always
# the low end and what is high stands out most.
SCALE = ("#f8f6e9", "#ccdebc", "#8bc9a8", "#50afa1", "#00919d", "#007097", "#004c8b", "#1b2f60", "#171835")
# Signed numbers: nine steps that leave the ground evenly on either side of zero, orange below and blue above.
SIGNED = {
    False: ("#692401", "#ab3f01", "#d17956", "#e6b7a5", "#f5f5f3", "#a7c8e1", "#559ccb", "#056ea2", "#014263"),
    True: ("#ffc1a2", "#e3814a", "#a9531e", "#60361f", "#18181b", "#1e475e", "#1178a5", "#45aade", "#9ddafe"),
}
# What is picked, and nothing else.
ACCENT = {False: "#d24100", True: "#fa8c58"}
# Named lines: hues of one lightness, half way, for either ground.
LINES = ("#4687d8", "#26998e", "#ad65be", "#ac7d1b", "#cd568b", "#4e9a52")
# Roles of heads, and more lines than that, up to which each is named: the same, and four more.
ROLES = (*LINES, "#8a8d96", "#b5654a", "#b3aadd", "#8f9b3c")
# Lines that have an order, such as layers: first to last.
ORDERED = ("#504994", "#3d5ea5", "#1574ac", "#0089ab", "#009ba2", "#10ab93", "#59b781", "#8cbf70")
CLOUD = "rgba(128, 132, 140, 0.32)"  # many lines of which none is meant in particular
ZERO = "#85888f"  # a line that marks where nothing changes, and its name, on either ground
FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def template(dark: bool) -> dict[str, Any]:
    """A plotly template."""
    ink, quiet, rule, ground = (
        ("#e9e9ec", "#a3a5ae", "#34363f", "#16171b") if dark else ("#1d1f26", "#62656f", "#e3e3e0", "#ffffff")
    )
    steps = SCALE[::-1] if dark else SCALE
    scale, signed = ([[i / (len(x) - 1), colour] for i, colour in enumerate(x)] for x in (steps, SIGNED[dark]))
    bar = {"thickness": 8, "outlinewidth": 0, "ticks": "", "tickfont": {"color": quiet, "size": 11}, "len": 1.0}
    axis = {
        "gridcolor": rule,
        "linecolor": rule,
        "zeroline": False,
        "automargin": True,
        "exponentformat": "power",
        "minexponent": 4,
        "tickfont": {"color": quiet, "size": 11},
        "title": {"font": {"color": quiet, "size": 12}, "standoff": 8},
    }
    return {
        "layout": {
            "font": {"family": FONT, "color": ink, "size": 13},
            "paper_bgcolor": ground,
            "plot_bgcolor": ground,
            "colorway": list(LINES),
            "colorscale": {"sequential": scale, "sequentialminus": scale, "diverging": signed},
            "xaxis": axis,
            "yaxis": axis,
            "title": {"x": 0, "xanchor": "left", "xref": "paper", "font": {"size": 16}},
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
            "hoverlabel": {"font": {"family": FONT, "size": 13, "color": ink}, "bgcolor": ground, "bordercolor": rule},
            "legend": {"font": {"color": quiet, "size": 12}, "orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
        "data": {
            "heatmap": [{"type": "heatmap", "colorscale": scale, "colorbar": bar}],
            "table": [
                {
                    "type": "table",
                    "header": {"fill": {"color": rule}, "line": {"color": rule}, "font": {"color": ink}},
                    "cells": {"fill": {"color": ground}, "line": {"color": rule}, "font": {"color": ink}},
                }
            ],
        },
    }
