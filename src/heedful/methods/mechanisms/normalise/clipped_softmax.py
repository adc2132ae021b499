"""Softmax stretched to [gamma, zeta] and cut back to [0, 1], so that a weight can be exactly 0 or 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardtanh_

from heedful.core.call import Call
from heedful.core.errors import FieldError
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
    gamma: float = -0.025  # a weight's lowest stretched value; the authors: -0.025 for 128 tokens, -12/512 for 512
    zeta: float = 1.0  # a weight's highest stretched value; the authors' scripts: 1

    def __post_init__(self) -> None:
        if not -1e3 <= self.gamma <= 0:
            raise FieldError(self, "gamma", self.gamma, "must be 0 or a little less", -0.025)
        if not 1 <= self.zeta <= 1e3:
            raise FieldError(self, "zeta", self.zeta, "must be 1 or a little more", 1.0)

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
