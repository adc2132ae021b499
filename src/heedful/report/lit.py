"""Pictures that maps light, as files in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heedful.core.figures import Lit, shrunk

if TYPE_CHECKING:
    import plotly.graph_objects as go

SIDE = 256  # pixels of a picture's longer side at most; what is smaller than LEAST is shown larger
LEAST = 96
DARK = 0.12  # of a picture's light that is left where nothing is looked at


def lit(pixels: Tensor, found: Tensor) -> Tensor:
    """A picture `[3 rows columns]`, as light as a map is high, up to its highest place."""
    size = pixels.shape[1:]
    share = torch.nn.functional.interpolate(found[None, None].float(), size, mode="bilinear", align_corners=False)[0]
    share = (share / share.max().clamp(min=1e-12)).clamp(0, 1)
    return pixels * (DARK + (1 - DARK) * share)


def png(pixels: Tensor) -> str:
    """A picture `[3 rows columns]` from 0 to 1 as a data address."""
    from PIL import Image

    there = io.BytesIO()
    Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(there, "PNG")
    return "data:image/png;base64," + base64.b64encode(there.getvalue()).decode()


def sources(figure: Lit) -> Iterator[tuple[str, str]]:
    """The picture as it is, then for each name."""
    pixels = shrunk(figure.pixels[None].detach().float().cpu(), SIDE)[0]
    if (times := -(-LEAST // max(pixels.shape[1:]))) > 1:
        pixels = pixels.repeat_interleave(times, 1).repeat_interleave(times, 2)
    yield "the picture", png(pixels)
    for name, found in figure.maps.items():
        yield name, png(lit(pixels, found.detach().cpu()))


def side_by_side(figure: Lit) -> go.Figure:
    """The picture as it is, and beside it for each name, as plotly draws it."""
    import plotly.graph_objects as objects
    from plotly.subplots import make_subplots

    each = list(sources(figure))
    drawn = make_subplots(1, len(each), subplot_titles=[name for name, _ in each], horizontal_spacing=0.01)
    for column, (_, source) in enumerate(each, 1):
        drawn.add_trace(objects.Image(source=source), 1, column)
    drawn.update_xaxes(visible=False)
    drawn.update_yaxes(visible=False)
    drawn.update_layout(title=figure.title)
    return drawn


def strip(figure: Lit) -> str:
    """The pictures as plain HTML, for notebooks."""
    each = "".join(
        f'<figure style="display:inline-block;margin:4px;text-align:center"><img src="{source}" alt="{escape(name)}">'
        f'<figcaption style="font-size:12px">{escape(name)}</figcaption></figure>'
        for name, source in sources(figure)
    )
    return f"<p><b>{escape(figure.title)}</b><br>{escape(figure.what)}</p><div>{each}</div>"
