"""The view of images as the page's script reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from heedful.core.figures import head_name
from heedful.report.data import colours, zipped


class ImageView(Protocol):
    """The images of a profile (`heedful.diagnosis.glances.ImageView`)."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def before(self) -> Sequence[str]: ...

    @property
    def grid(self) -> Sequence[int]: ...

    @property
    def heads(self) -> Sequence[tuple[int, int]]: ...

    @property
    def layers(self) -> Sequence[int]: ...

    @property
    def pixels(self) -> Tensor: ...  # [images c rows cols]

    @property
    def looks(self) -> Tensor: ...  # [2 images layers h n]

    @property
    def maps(self) -> Tensor: ...  # [m heads n n]


def packed(view: ImageView) -> tuple[dict[str, Any], str]:
    """What the script must know first, and the numbers as compressed bytes in base64.

    Each row of weights is its highest weight, in four bytes, and 255ths of the roots of what the others are of that.
    """
    pictures = torch.stack([colours(x.float()) for x in view.pixels])
    looks, maps = _rows(view.looks), _rows(view.maps)
    about = {
        "images": [name.rpartition("/")[2] for name in view.names],
        "size": list(pictures.shape[1:3]),
        "before": list(view.before),
        "grid": list(view.grid),
        "heads": [head_name(*head) for head in view.heads],
        "layers": list(view.layers),
        "across": view.looks.shape[3],
        "whole": len(view.maps),
    }
    parts = (looks[0], maps[0], looks[1], maps[1], pictures)
    return about, zipped(b"".join(x.contiguous().numpy().tobytes() for x in parts))


def _rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The highest weight of each row, and bytes for all."""
    x = x.detach().float().cpu().nan_to_num().clamp(0, 1)
    high = x.amax(-1)
    return high, ((x / high.clamp(min=1e-8)[..., None]).sqrt() * 255).round().to(torch.uint8)
