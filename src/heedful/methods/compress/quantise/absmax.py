"""w = s round(w / s), s = max |w| / (2^(bits - 1) - 1) of a row: the nearest of evenly spaced values."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Interval
from torch import Tensor

from heedful.core.entry import Layer
from heedful.core.kinds.weights import HeadWeights
from heedful.kit.rounding import Rounding
from heedful.methods.compress.quantise._int8 import PAPER
from heedful.methods.compress.quantise._quantiser import Quantiser


class Absmax(Quantiser):
    """Rounds weights to the nearest of few values, without looking at any text; the weights' half of LLM.int8().

    share "row": the weights of one output share a scale, which the paper calls vector-wise.
    share "matrix": all weights of a projection share one.
    """

    paper = replace(
        PAPER,
        differs=(
            "Simulated: weights are written back as ordinary numbers, so that nothing gets smaller or faster.",
            "The projections of attention alone; the paper does the feed-forward part too.",
            "Any number of bits from 2 to 8; the paper has 8.",
        ),
    )
    bits: Annotated[int, Interval(ge=2, le=8)] = 8  # of a weight; the paper has 8
    share: Literal["row", "matrix"] = "row"  # what has one scale: "row" or "matrix"

    @classmethod
    def neutral(cls) -> Absmax:
        return cls(projections="")

    def rounded(self, matrices: dict[str, Tensor], weights: HeadWeights, layer: Layer) -> dict[str, Tensor]:
        return {letter: self.on_grid(x) for letter, x in matrices.items()}

    def on_grid(self, x: Tensor) -> Tensor:
        """The matrix `[o i]` of nearest values."""
        rows = x if self.share == "row" else x.reshape(1, -1)
        return Rounding.absmax(rows, self.bits).of(rows).view_as(x)


if __name__ == "__main__":
    from heedful import models, operate

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    for bits in (8, 4, 3):
        print(bits, operate(model, Absmax(bits))(**text, labels=text["input_ids"]).loss.item())
