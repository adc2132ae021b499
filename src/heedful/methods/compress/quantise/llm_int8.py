"""x_j = s_t round(x_j / s_t), s_t = max |x| / 127 over the columns of token t without an outlier; outliers stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from annotated_types import Interval
from torch import Tensor

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.ranges import NonNegativeFloat
from heedful.core.sites import Site, at
from heedful.kit.rounding import Rounding
from heedful.methods.compress.quantise._int8 import PAPER


class LLMInt8(Method):
    """What attention's projections are handed, rounded to 8 bits token by token, but for the columns of outliers.

    A column is one of the input's channels, and has an outlier where some token of the text reaches the threshold
    there. Put it on a model whose weights `Absmax` rounded, and both halves of the multiplication are in 8 bits.
    """

    paper = replace(
        PAPER,
        differs=(
            "Simulated: inputs are rounded and multiplied as ordinary numbers, so that nothing gets faster.",
            "The projections of attention alone; the paper does the feed-forward part too.",
            "Outliers are looked for in each text by itself, not in all texts of a batch together.",
            "Under Absmax the weights of outlier columns are in 8 bits too, as bitsandbytes keeps them; the paper "
            "leaves them in 16.",
            "Any number of bits from 2 to 8; the paper has 8.",
        ),
    )
    one_text = True
    causal = False
    chunk_invariant = False
    threshold: NonNegativeFloat = 6.0  # magnitude of an outlier; the paper's; 0: every column is left as it is
    bits: Annotated[int, Interval(ge=2, le=8)] = 8  # of an input; the paper has 8

    @classmethod
    def neutral(cls) -> LLMInt8:
        return cls(0.0)

    @classmethod
    def example(cls) -> LLMInt8:
        return cls(1.5, 3)

    @at(Site.HIDDEN)
    def shown(self, x: Tensor, call: Call) -> Tensor:
        return self.rounded(x, call.is_text[:, 0])

    @at(Site.HEAD_OUTPUT)
    def handed_on(self, heads: Tensor, call: Call) -> Tensor:
        x = heads.transpose(1, 2)
        return self.rounded(x.flatten(2), call.is_text[:, 0]).view_as(x).transpose(1, 2)

    def rounded(self, x: Tensor, is_text: Tensor) -> Tensor:
        """Inputs `[b n e]`, of which `[b|1 n]` are text."""
        outlier = ((x.abs() >= self.threshold) & is_text[..., None]).any(1, keepdim=True)
        return x.where(outlier, Rounding.absmax(x.masked_fill(outlier, 0.0), self.bits).of(x))


if __name__ == "__main__":
    from heedful import attach, models, operate
    from heedful.methods import Absmax

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    for threshold in (6.0, 1e9):
        with attach(operate(model, Absmax()), LLMInt8(threshold)) as run:
            print(threshold, run(**text, labels=text["input_ids"]).loss.item())
