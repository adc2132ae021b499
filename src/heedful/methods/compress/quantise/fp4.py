"""w = s e(w / s), e the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, s shared by a block of weights."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Stack
from heedful.core.paper import Paper
from heedful.kit.batches import at_least_one
from heedful.kit.labels import labelled, loss_of
from heedful.kit.rounding import above_zero
from heedful.methods.compress.quantise._quantiser import Quantiser

TOP, SCALE_TOP = 6.0, 448.0  # the largest values of E2M1 and of E4M3
BLOCKS = {"nvfp4": 16, "mxfp4": 32}


class FP4(Quantiser):
    """Rounds weights to four-bit floats, and finds out which projections and layers bear it least.

    form "nvfp4": blocks of 16 with a scale in E4M3, and one more scale for the whole matrix.
    form "mxfp4": blocks of 32 whose scale is a power of two.
    `fit` takes batches with a loss, as PruneHeads does, and keeps how much the loss rises when a projection alone is
    rounded, in all layers, and when a layer alone is, in all projections: `table()`.
    """

    paper = Paper(
        "P324",
        "Diagnosing FP4 inference: a layer-wise and block-wise sensitivity analysis of NVFP4 and MXFP4",
        "Musa Cim, Burak Topcu, Mahmut Taylan Kandemir",
        2026,
        "2603.08747",
        differs=(
            "Written from the abstract and the formats' specifications; the paper's settings were not at hand.",
            "Simulated, and weights alone: what they are multiplied with stays as it is.",
            "The projections of attention; its claim rounds the feed-forward part by the same function.",
        ),
    )
    form: Literal["nvfp4", "mxfp4"] = "nvfp4"  # "nvfp4" or "mxfp4"
    rises: Fitted | None = None  # "projections" [as many as named], "layers" [layers]: nats that the loss rises

    @classmethod
    def neutral(cls) -> FP4:
        return cls(projections="")

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> FP4:
        shown = [labelled(batch) for batch in at_least_one(self, batches)]
        layers = [x.number for x in context.layers if self.layers is None or x.number in self.layers]

        def loss(of: FitContext) -> float:
            with torch.no_grad(), of.attach(Stack()) as run:
                return statistics.fmean(loss_of(self, run, inputs).item() for inputs in shown)

        whole = loss(context)
        alone = {
            "projections": [replace(self, projections=letter) for letter in self.projections],
            "layers": [replace(self, layers=(number,)) for number in layers],
        }
        found = {name: torch.tensor([loss(context.after(x)) - whole for x in all_]) for name, all_ in alone.items()}
        numbers = torch.tensor(layers)
        return replace(self, rises=Fitted({**found, "numbers": numbers}))

    def table(self) -> dict[str, float]:
        """How much the loss rises, in nats, when one projection or layer alone is rounded; the most sensitive first."""
        if self.rises is None:
            good = "heedful.fit(FP4(), model, batches)"
            raise FieldError(self, "rises", None, "is not known yet: fit", good)
        names = [*self.projections, *(f"layer {number}" for number in self.rises["numbers"].tolist())]
        rises = [*self.rises["projections"].tolist(), *self.rises["layers"].tolist()]
        return dict(sorted(zip(names, rises, strict=True), key=lambda item: -item[1]))

    def rounded(self, matrices: dict[str, Tensor], weights: HeadWeights, layer: Layer) -> dict[str, Tensor]:
        return {letter: self.in_blocks(x) for letter, x in matrices.items()}

    def in_blocks(self, x: Tensor) -> Tensor:
        """The matrix `[o i]` of nearest values, in blocks along a row."""
        size, wide = BLOCKS[self.form], x.float()
        blocks = pad(wide, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
        highest = blocks.abs().amax(-1, keepdim=True)
        if self.form == "mxfp4":
            exponent = torch.frexp(highest).exponent - 1 - 2  # of the block, less that of 4, the highest power of two
            scale = torch.ldexp(torch.ones_like(highest), exponent.clamp(-127, 127))
        else:
            whole = highest.max() / (TOP * SCALE_TOP)
            scale = (highest / TOP / above_zero(whole)).to(torch.float8_e4m3fn).float() * whole
        scale = above_zero(scale)
        return (scale * e2m1(blocks / scale)).flatten(1)[:, : x.shape[1]].to(x.dtype)


def e2m1(x: Tensor) -> Tensor:
    """The nearest four-bit float, the even one of two; 6 at most."""
    exponent = (torch.frexp(x).exponent - 1).clamp(0, 2)
    step = torch.ldexp(torch.ones_like(x), exponent - 1)
    return ((x / step).round() * step).clamp(-TOP, TOP)


if __name__ == "__main__":
    from heedful import fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    for name, rise in list(fit(FP4("mxfp4"), model, [dict(text)]).table().items())[:5]:
        print(name, rise)
