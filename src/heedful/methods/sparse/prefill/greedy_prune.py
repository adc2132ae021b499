"""Patch by patch the one of the greatest s_i / max s + w (1 - max_j cos(x_i, x_j)), j the patches kept so far."""

from __future__ import annotations

import math
from math import ceil
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.kit.picked import PickedPatches


class GreedyPrune(PickedPatches):
    """Shows a language model patches that are salient and unlike each other, chosen one after another.

    How salient a patch is, is the mean weight that all tokens of the encoder give to it.
    """

    paper = Paper(
        "P210",
        "GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models",
        "Ruiguang Pei, Weiqing Sun, Zhihui Fu, Jun Wang",
        2025,
        "2506.13166",
        "arXiv",
        differs=(
            "Only the abstract and others' accounts could be read: a greedy choice by saliency and diversity is "
            "theirs, the sum that is maximised, its scales and its weight are ours. By an account the authors keep the "
            "most salient patch, strike out all that are more alike to it than a threshold, and so on.",
            "Saliency comes from the encoder alone, so that one choice serves every question; the authors', by two "
            "accounts, is the cosine of a patch with the question's last token in the language model.",
            "What is unlike is told by the input of the encoder layer's attention, behind the norm of that layer.",
            "A patch that goes is seen by nobody behind the layer, and keeps its place.",
        ),
    )
    diversity: float = 1.0  # weight of being unlike the kept; 0: the most salient, whatever they are like

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.diversity < math.inf:
            raise FieldError(self, "diversity", self.diversity, "must be 0 or more, and finite", 1.0)

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where = self.patches(call)
        salient = torch.einsum("bhqk->bk", weights)[:, where]  # the mean but for a factor, which greedy() takes away
        tokens = cast(Tensor, call.hidden)[:, where].to(salient.dtype)
        return greedy(salient, tokens, ceil(self.share * salient.shape[1]), self.diversity)


def greedy(salient: Tensor, tokens: Tensor, count: int, diversity: float) -> Tensor:
    """Which patches are kept `[b p]`, by how salient they are `[b p]` and what they are `[b p e]`."""
    salient = salient / salient.amax(-1, keepdim=True)
    tokens = normalize(tokens, dim=-1)
    kept = torch.zeros_like(salient, dtype=torch.bool)
    gain, alike = salient, torch.full_like(salient, -torch.inf)
    for _ in range(count):
        chosen = gain.masked_fill(kept, -torch.inf).argmax(-1, keepdim=True)
        kept = kept.scatter(1, chosen, True)
        mine = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[-1]))
        alike = torch.maximum(alike, (tokens @ mine.mT)[..., 0])
        gain = salient + diversity * (1 - alike)
    return kept


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for diversity in (0.0, 1.0):
        with attach(model, GreedyPrune(layer=0, diversity=diversity)) as run:
            print(diversity, run.difference(**inputs))
