"""Images read off a mean: of all tokens, for what mixes none, which the last layer hands to each; or of the patches."""

from __future__ import annotations

import torch
from torch import Tensor

from claims._digits import Reads
from claims._lab import DIGITS
from heedful.authoring import Call, Method, Site, at
from heedful.kit.patches import patch_tokens


class _Mean(Method):
    """The same weight for every token."""

    @at(Site.PATTERN)
    def level(self, weights: Tensor, call: Call) -> Tensor:
        return torch.full_like(weights, 1 / weights.shape[-1])


class MeanPatch(Method):
    """The mean of the patches in the class token's place, for what pools them in another way to be held against."""

    paper = Reads.paper

    @at(Site.RESIDUAL)
    def pool(self, stream: Tensor, call: Call) -> Tensor:
        mean = stream[:, patch_tokens(self, call)].mean(1, keepdim=True)
        return stream.where(~call.marked_queries("cls")[:, 0, :, None], mean)


BEFORE = range(DIGITS.layers - 1)
END = _Mean().on(layers=DIGITS.layers - 1)
