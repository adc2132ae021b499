"""s_i = p sum_h a_i^h |o_i^h| / sum_g |o_i^g|, of the class token's weights a; patch i stays above theta."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from heedful.core.call import Call, Merged
from heedful.core.entry import Layer
from heedful.core.paper import Paper
from heedful.core.ranges import Layers, NonNegativeFloat, PositiveFloat, PositiveShare
from heedful.core.sites import Site, at, penalises, reads
from heedful.kit.merging import MergesTokens, is_fixed, kept
from heedful.kit.running import wide
from heedful.kit.scores import scores_of

STAYS, OPEN, SHARES = "stays", "open", "shares"
LEAST = -20.0  # the logarithm of a mask that is zero: a key so far down gets nothing that counts


class AdaptiveSparseViT(MergesTokens):
    """Drops behind some layers the patches that the class token looks at less than a learned threshold.

    While a model trains, patches are masked in the attention of later layers and thresholds learn as if the mask were
    soft, and a penalty draws the share of tokens that layers have to a budget. At rest they are gone.
    """

    paper = Paper(
        "P019",
        "Adaptive Sparse ViT: Towards Learnable Adaptive Token Pruning by Fully Exploiting Self-Attention",
        "Xiangcheng Liu, Tianyi Wu, Guodong Guo",
        2022,
        "2209.13802",
        "IJCAI 2023",
        differs=(
            "Scores are in units of what a patch gets on average; the authors' are plain weights, of which thresholds "
            "begin at 0.001, 0.002 and 0.003.",
            "Each image drops what lies below the threshold; the authors' code does where it has one image, and keeps "
            "of each image of several as many as all keep on average.",
            "In training a masked patch does not see itself any more than others do; in the authors' code it does.",
            "The budget is the mean share of patches over layers, for which the authors count operations; their loss "
            "that keeps a model near an unpruned one is left out.",
        ),
    )
    layers: Layers = (3, 6, 9)  # behind which patches are dropped; the authors: 3, 6 and 9 of 12
    budget: PositiveShare = 0.7  # the mean share of patches that layers are to have; the authors: 0.7, of operations
    weight: NonNegativeFloat = 2.0  # of the penalty for missing the budget, 0: none; the authors: 2
    start: float = 0.5  # thresholds before training; 1 is what a patch gets if all get the same
    # of sigmoid(sharpness (s - theta)), which thresholds learn by; the authors: 10,000 / 196
    sharpness: PositiveFloat = 50.0

    @classmethod
    def example(cls) -> AdaptiveSparseViT:
        return cls((0, 1), start=0.8)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"threshold": torch.tensor([self.start])} if layer.number in self.layers else {}

    @at(Site.SCORES, training=True)
    def mask(self, scores: Tensor, call: Call) -> Tensor:
        still = call.state.forward.get(OPEN)
        return scores if still is None else scores + still[:, None, None, call.cols].to(scores.dtype)

    @reads(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> None:
        """Decide which patches later layers see: by a mask where the model trains, else for good."""
        if call.layer not in self.layers:
            return
        forward, free = call.state.forward, _free(len(heads), call)
        still = forward.get(OPEN) if call.training else None
        above = self.scored(heads, call, free, still) - call.params["threshold"].to(heads)
        if call.training:
            (soft,) = wide(torch.sigmoid(self.sharpness * above))
            hard = (above > 0).to(soft.dtype).clamp(min=math.exp(LEAST))
            forward[OPEN] = (hard + (soft - soft.detach())).log().masked_fill(~free, 0.0)  # hard, and learns as soft
        else:
            forward[STAYS] = (above > 0) | ~free

    def scored(self, heads: Tensor, call: Call, free: Tensor, still: Tensor | None) -> Tensor:
        """What the class token gives each token, in units of what a patch gets on average, `[b n]`."""
        query, key = cast(Tensor, call.query), cast(Tensor, call.key)
        seen = scores_of(query[:, :, :1], key, call, slice(0, 1))[:, :, 0]  # [b h n]
        seen = seen.masked_fill(~call.is_text, torch.finfo(seen.dtype).min)
        count = free.to(heads.dtype)
        if still is not None:
            seen, count = seen + still[:, None], count * still.exp()
        norm = heads.norm(dim=-1)
        share = norm / norm.sum(1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny)
        given = (seen.softmax(-1) * share).sum(1).masked_fill(~free, 0.0)
        return given * count.sum(1, keepdim=True) / given.sum(1, keepdim=True)

    @at(Site.RESIDUAL, training=False, merges=True)
    def drop(self, stream: Tensor, call: Call) -> Tensor | Merged:
        stays = call.state.forward.pop(STAYS, None)
        if stays is None or bool((stays | ~call.is_text[:, 0]).all()):
            return stream
        return kept(stream, stays & call.is_text[:, 0])  # empty places go

    @penalises(Site.RESIDUAL, when="weight")
    def spend(self, stream: Tensor, call: Call) -> Tensor | None:
        if not call.training:
            return None
        forward, free = call.state.forward, _free(len(stream), call)
        shares: tuple[Tensor, ...] = forward.get(SHARES, (stream.new_ones(()),))  # all in the first
        if call.ends_list:
            return self.weight * (torch.stack(shares).mean() - self.budget).abs()
        still = forward.get(OPEN, torch.zeros_like(stream[..., 0]))
        forward[SHARES] = (*shares, still.exp()[free].mean().to(stream.dtype))
        return None


def _free(rows: int, call: Call) -> Tensor:
    """Which tokens may be dropped, `[b n]`: all but the first, which the class token is, and its like."""
    free = ~is_fixed(call).expand(rows, -1)
    return free & (torch.arange(free.shape[1], device=free.device) > 0)


if __name__ == "__main__":
    from heedful import attach, models

    with attach(models.vision().model, AdaptiveSparseViT(start=0.3)) as run:
        print(run.difference(pixel_values=torch.randn(1, 3, 224, 224)))
