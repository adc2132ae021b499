"""Small lines beside findings: how the figure behind each runs, without axes."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.figures import Curves, Figure, HeadMap

WIDE, HIGH, EDGE = 100, 28, 2  # of the drawing, in its own units


def spark(figure: Figure) -> dict[str, str] | None:
    """A line's path, what it runs over and what it shows; None where the figure is no line."""
    if isinstance(figure, HeadMap):
        y, over = figure.values.double().nanmean(1), "layer"
    elif isinstance(figure, Curves) and figure.lines:
        y, over = next(iter(figure.lines.values())).double(), figure.x_label
        y = y.clamp(min=1e-30).log().masked_fill(y <= 0, torch.nan) if figure.log_y else y
    else:
        return None
    if (line := _line(y.cpu())) is None:
        return None
    kind = "map" if isinstance(figure, HeadMap) else "curve"
    return {"line": line, "over": over, "title": figure.title, "key": figure.key, "kind": kind}


def _line(y: Tensor) -> str | None:
    """A path through the finite numbers, the lowest at the bottom; of very many through as many as can be seen."""
    y = y[torch.linspace(0, len(y) - 1, min(len(y), WIDE)).round().long()]
    known = y.isfinite()
    if int(known.sum()) < 2:
        return None
    x = torch.linspace(EDGE, WIDE - EDGE, len(y), dtype=torch.float64)[known]
    y = y[known]
    height = (y - y.min()) / (y.max() - y.min()).clamp(min=1e-30)
    points = zip(x.tolist(), (HIGH - EDGE - height * (HIGH - 2 * EDGE)).tolist(), strict=True)
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
