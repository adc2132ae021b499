"""Softmax stretched to [gamma, zeta] and cut back to [0, 1], so that a weight can be exactly 0 or 1."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import hardtanh_

from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at


class ClippedSoftmax(Method):
    """Lets a head do nothing without extreme scores: clip((zeta - gamma) softmax + gamma, 0, 1)."""

    paper = Paper(
        "P304",
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        "Yelysei Bondarenko, Markus Nagel, Tijmen Blankevoort",
        2023,
        "2306.12929",
        "NeurIPS 2023",
    )
    # a weight's lowest stretched value; the authors: -0.025 for 128 tokens, -12/512 for 512
    gamma: Annotated[float, Interval(ge=-1000.0, le=0)] = -0.025
    # a weight's highest stretched value; the authors' scripts: 1
    zeta: Annotated[float, Interval(ge=1, le=1000.0)] = 1.0

    @classmethod
    def neutral(cls) -> ClippedSoftmax:
        return cls(gamma=0.0, zeta=1.0)

    @classmethod
    def example(cls) -> ClippedSoftmax:
        return cls(gamma=-0.1, zeta=1.1)

    @at(Site.NORMALISE)
    def clip(self, scores: Tensor, call: Call) -> Tensor:
        weights = torch.softmax(scores, -1)
        stretched = torch.add(weights.new_full((), self.gamma), weights, alpha=self.zeta - self.gamma)
        return hardtanh_(stretched, 0.0, 1.0)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west.", return_tensors="pt")
    for gamma in (-0.0001, -0.001, -0.025):
        with attach(model, ClippedSoftmax(gamma)) as run:
            print(gamma, run(**text, labels=text["input_ids"]).loss.item())
