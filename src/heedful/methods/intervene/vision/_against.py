"""What methods share that decode against what a model says when it sees too little of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from heedful.core.kinds.decode import NOTHING_READ, Decode, Read
from heedful.core.ranges import NonNegativeFloat, Share

PROMPT, LITTLE = "prompt", "little"  # the names of the two runs


class Against(Decode, abstract=True):
    """(1 + alpha) x - alpha y of tokens that x finds plausible: x of the prompt as it is, y where little is seen."""

    alpha: NonNegativeFloat = 1.0  # weight of the contrast; 0 changes nothing
    beta: Share = 0.1  # tokens are cut off that are less likely than this share of the likeliest; 0: none

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        whole = logits[PROMPT].float()
        if LITTLE not in logits:
            return whole
        return self.plausible((1 + self.alpha) * whole - self.alpha * logits[LITTLE].float(), whole)

    def plausible(self, mixed: Tensor, whole: Tensor) -> Tensor:
        """The mixed logits of the tokens that the whole finds likely enough, and no others."""
        if self.beta == 0:
            return mixed
        return mixed.masked_fill(whole < whole.amax() + math.log(self.beta), -torch.inf)
