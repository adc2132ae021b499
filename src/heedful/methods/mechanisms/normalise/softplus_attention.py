"""Weights a = softplus(log d log n cos(q, k)) over their sum, then relu(n a - 1)^p over theirs; n keys are seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at

FIRST = 3  # rows that see so many keys or fewer keep all of their weights


class SoftplusAttention(Method):
    """LSSAR: softplus over its sum, then sharpened: below the mean nothing is left. For models trained with it."""

    paper = Paper(
        "P035",
        "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
        "Bo Gao, Michael W. Spratling, Letizia Gionfrida",
        2025,
        "2501.13428",
        "ICML 2026",
        differs=(
            "The authors' code could not be had; the formula is read from a summary of the paper and two "
            "reimplementations of it, which agree.",
            "n is the number of keys that a row sees, which under a causal mask alone is the paper's: its place.",
            "What is left of a row is divided by its highest before the power is taken, which changes no weight and "
            "needs no number to keep the sum from vanishing; a row of equal weights looks at nothing.",
        ),
    )
    power: float = 15.0  # p, how much the second stage sharpens; the paper: 15, and 3 for texts as long as in training

    def __post_init__(self) -> None:
        if not 1 <= self.power < math.inf:
            raise FieldError(self, "power", self.power, "must be 1 or more", 15.0)

    @classmethod
    def example(cls) -> SoftplusAttention:
        return cls(3.0)

    @at(Site.QUERY)
    def direct(self, query: Tensor, call: Call) -> Tensor:
        return normalize(query, dim=-1) * (math.log(query.shape[-1]) / call.scale)

    @at(Site.KEY)
    def shorten(self, key: Tensor, call: Call) -> Tensor:
        return normalize(key, dim=-1)

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        keep = scores.new_ones(scores.shape[-1], dtype=torch.bool) if call.keep is None else call.keep
        seen = keep.sum(-1, keepdim=True).clamp(min=1)
        weights = softplus(scores * seen.log()).masked_fill(~keep, 0.0)
        # the sum is above 0 wherever something is seen, and so is that of the powers, whose highest is 1
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        sharp = torch.relu(weights * seen - (seen > FIRST).to(scores.dtype))
        highest = sharp.detach().amax(-1, keepdim=True)
        sharp = (sharp / torch.where(highest > 0, highest, 1.0)) ** self.power
        return sharp / sharp.sum(-1, keepdim=True).clamp(min=1.0)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, SoftplusAttention()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
