"""Weibull fit P(|w| <= x) = 1 - exp(-(x / s)^k) of each projection: ln -ln(1 - F) against ln x on the middle 80 %."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, Self

import torch
from annotated_types import Ge
from torch import Tensor

from heedful.core.entry import FitContext
from heedful.core.figures import Curves, Description, Finding
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import Weights
from heedful.core.paper import Paper
from heedful.core.ranges import ProperShare

GAUSSIAN = 1.2054  # the shape that Gaussian weights get, whatever their spread
BINS = 1024
NAMES = ("queries", "keys", "values", "output")


@lru_cache(maxsize=8)
def _spread(count: int, sample: int, device: torch.device) -> Tensor:
    """The places of a sample that is spread evenly over so many; many matrices have as many weights."""
    return torch.linspace(0, count - 1, sample, device=device, dtype=torch.float64).long()


class WeibullWeights(Weights):
    """How the weights of a layer's projections are distributed, from the weights alone: `fit(it, model, ())`.

    Shape 1.2 is where training starts; below it few weights outgrow many small ones.
    """

    paper = Paper(
        "P042",
        "A Two-Parameter Weibull Framework for Diagnosing Transformer Weight Distributions",
        "Tiexin Ding",
        2026,
        "2605.18898",
        differs=(
            "The projections of attention alone; the authors fit those of the feed-forward part too.",
            "The bins reach from a matrix' least weight to its largest; the authors' from 1e-12 to 100, so that most "
            "of theirs are empty. Both leave out weights of exactly zero.",
        ),
    )
    # what is fitted: "shape", "scale" and "r2", each [layers 4]: queries, keys, values, output
    middle: ProperShare = 0.8  # share of the weights that the line is drawn through; the paper's default
    # weights of a matrix that are looked at, evenly spread; None: all, as in the paper
    sample: Annotated[int, Ge(1000)] | None = None

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> Self:
        counted = []
        for layer in range(len(context.layers)):
            w = context.weights(layer)
            counted += [self._counted(x) for x in (w.q, w.k, w.v, w.o)]
        found = self._lines(*map(torch.stack, zip(*counted, strict=True))).unflatten(0, (-1, 4))
        return replace(self, fitted=Fitted(dict(zip(("shape", "scale", "r2"), found.unbind(-1), strict=True))))

    def line(self, weights: Tensor) -> Tensor:
        """Shape, scale and R2 of one matrix, `[3]`; nan where all weights are alike."""
        return self._lines(*(x[None] for x in self._counted(weights)))[0]

    def _counted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """How many of a matrix' sizes are in each of equal bins of their logarithms, and where these begin and end."""
        x = weights.detach().flatten()
        if self.sample is not None and len(x) > self.sample:
            x = x.index_select(0, _spread(len(x), self.sample, x.device))
        x = x.float().abs()
        if len(x) and not x.amin() > 0:  # picking out is the dearest step, and few models have zeros
            x = x[x > 0]
        x = x.log()
        low, high = (float(end) for end in x.aminmax()) if len(x) else (0.0, 0.0)
        ends = torch.tensor([low, high], dtype=torch.float64, device=x.device)
        return torch.histc(x, BINS, low, high).double(), ends

    def _lines(self, count: Tensor, ends: Tensor) -> Tensor:
        """Shape, scale and R2 of matrices `[m 3]`, from their bins `[m bins]` and where these end `[m 2]`."""
        low, high = ends.split(1, -1)
        center = low + (torch.arange(BINS, dtype=torch.float64, device=count.device) + 0.5) * (high - low) / BINS
        below = (count.cumsum(-1) - count / 2) / count.sum(-1, keepdim=True)
        margin = (1 - self.middle) / 2
        body = (below >= margin) & (below <= 1 - margin)
        weight = count * body
        weight = weight / weight.sum(-1, keepdim=True)
        a, b = center, (-torch.log1p(-below)).log().where(body, 0.0)
        a0, b0 = ((weight * x).sum(-1, keepdim=True) for x in (a, b))
        a, b = a - a0, b - b0
        aa, ab, bb = ((weight * u * v).sum(-1) for u, v in ((a, a), (a, b), (b, b)))
        shape = ab / aa
        return torch.stack([shape, (a0[:, 0] - b0[:, 0] / shape).exp(), ab.square() / (aa * bb)], -1)

    @property
    def shapes(self) -> Tensor:
        """`[layers 4]`, by projection in the order of NAMES."""
        return self.found["shape"]

    def describe(self) -> Description:
        shapes = self.shapes
        lines = {name: shapes[:, i] for i, name in enumerate(NAMES)}
        curves = Curves(
            "weibull",
            "Distribution of weights",
            f"The shape of the distribution of weight magnitudes in each projection: {GAUSSIAN:.2f} is a Gaussian, "
            "where training starts; lower means few large weights among many small ones.",
            x=list(range(len(shapes))),
            lines=lines | {"a Gaussian": torch.full((len(shapes),), GAUSSIAN)},
            x_label="layer",
            y_label="Weibull shape",
            folded=True,
        )
        middle = shapes.nanmedian(0).values.tolist()
        if not all(math.isfinite(m) for m in middle):
            return Description((curves,))
        q, k, v, o = (f"{m:.2f}" for m in middle)
        text = (
            f"Weights of query and key projections have median shapes {q} and {k}, values and output {v} and {o}; a "
            f"Gaussian, where training starts, has {GAUSSIAN:.2f}, and lower means heavier tails."
        )
        return Description((curves,), findings=(Finding(text, 0.2, shows="weibull"),))


if __name__ == "__main__":
    from heedful import fit, models

    found = fit(WeibullWeights(), models.default().model, ())
    for finding in found.describe().findings:
        print(finding.text)
