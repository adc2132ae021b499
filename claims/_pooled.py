"""Digits read off the mean of all tokens, for what mixes none: the last layer hands it to every token."""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import DIGITS
from heedful.authoring import Call, Method, Site, at


class _Mean(Method):
    """The same weight for every token."""

    @at(Site.PATTERN)
    def level(self, weights: Tensor, call: Call) -> Tensor:
        return torch.full_like(weights, 1 / weights.shape[-1])


BEFORE = range(DIGITS.layers - 1)
END = _Mean().on(layers=DIGITS.layers - 1)
