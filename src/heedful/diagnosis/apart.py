"""The texts in a few parts, each measured by itself: how far these lie apart says how much texts differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.figures import Curves, Description, Figure
from heedful.core.stats import Statistic

MOST = 5  # parts: another one's median lies between the lowest and the highest of five in 15 of 16 cases

Found = dict[str, Statistic]


def joined(one: Mapping[str, Statistic], other: Mapping[str, Statistic]) -> Found:
    """The statistics of both."""
    both = {key: one[key] + other[key] for key in one if key in other}
    return {**one, **other, **both}


def dealt(parts: Iterable[Mapping[str, Statistic]]) -> tuple[Found, ...]:
    """At most so many parts, those beyond dealt out among the first; none where there is but one."""
    out: list[Found] = []
    for i, part in enumerate(filter(None, parts)):
        if i < MOST:
            out.append(light(part))
        else:
            out[i % MOST] = joined(out[i % MOST], light(part))
    return tuple(out) if len(out) > 1 else ()


def light(part: Mapping[str, Statistic]) -> Found:
    """In single precision, which is enough to see how far parts lie apart."""
    return {key: stat.having({n: _single(x) for n, x in stat.tensors().items()}) for key, stat in part.items()}


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def banded(told: Description, parts: Sequence[Description]) -> Description:
    """The same, with every curve between the lowest and the highest that the parts have by themselves."""
    figures = [{figure.key: figure for figure in part.figures} for part in parts]
    band = f"from the lowest to the highest of {len(parts)} parts of what was read, each measured by itself"

    def one(figure: Figure) -> Figure:
        if not isinstance(figure, Curves):
            return figure
        others = [found for part in figures if isinstance(found := part.get(figure.key), Curves)]
        bands = {}
        for name in figure.lines:
            seen = [dict(zip(x.x, x.lines[name].tolist(), strict=True)) for x in others if name in x.lines]
            rows = torch.tensor([[row.get(x, torch.nan) for x in figure.x] for row in seen])
            if len(rows) < 2:
                continue
            known = rows.isfinite().sum(0) > 1
            low, high = rows.nan_to_num(torch.inf).amin(0), rows.nan_to_num(-torch.inf).amax(0)
            bands[name] = low.where(known, torch.nan), high.where(known, torch.nan)
        return replace(figure, bands=bands, band=band if bands else "")

    return replace(told, figures=tuple(map(one, told.figures)))
