"""Attention patterns as one small HTML file: every head as a thumbnail, the chosen one large, and the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.figures import head_name
from heedful.report.colours import SCALE
from heedful.report.data import colours, rooted, zipped
from heedful.report.page import asset, embed, environment

MOST = 24 << 20  # numbers that a page holds


class Picture(Protocol):
    """An image whose patches are tokens."""

    @property
    def pixels(self) -> Tensor: ...  # [c rows cols]

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def before(self) -> list[str]: ...


class Maps(Protocol):
    """Attention patterns (`heedful.explaining.attention_patterns.Patterns`)."""

    @property
    def tokens(self) -> list[str]: ...

    @property
    def maps(self) -> Mapping[int, Tensor]: ...

    @property
    def heads(self) -> Mapping[int, list[int]]: ...

    @property
    def text(self) -> frozenset[int] | None: ...

    @property
    def picture(self) -> Picture | None: ...


def render(patterns: Maps) -> str:
    """The page as text."""
    count = sum(x.numel() for x in patterns.maps.values())
    if count > MOST:
        rule = f"has {count:,} numbers and a page holds {MOST:,}; name fewer heads"
        raise FieldError("Patterns", "page", f"{len(patterns.maps)} layers", rule, "heads=[(3, 1)]")
    rows, numbers = [], []
    for layer, x in patterns.maps.items():
        names = [head_name(layer, head) for head in patterns.heads[layer]]
        reads_text = patterns.text is None or layer in patterns.text
        rows.append({"layer": layer, "heads": names, "q": x.shape[1], "k": x.shape[2], "text": reads_text})
        numbers.append(rooted(x).flatten())
    read = {"tokens": list(patterns.tokens), "rows": rows, "scale": list(SCALE), "picture": None}
    if (picture := patterns.picture) is not None:
        seen = colours(picture.pixels)
        read["picture"] = {"size": seen.shape[:2], "grid": picture.grid, "before": picture.before}
        numbers.append(seen.flatten())
    packed = zipped(torch.cat(numbers).numpy().tobytes())
    return environment().from_string(asset("patterns.html")).render(data=embed(read), numbers=packed)
