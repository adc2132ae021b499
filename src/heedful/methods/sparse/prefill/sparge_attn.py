"""softmax(mean q . mean k) by blocks, the fewest that reach `mass`; blocks of unlike tokens are always computed."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import normalize

from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.kit.blocks import BlockSparse, Grid, cover, means


class SpargeAttn(BlockSparse):
    """Predicts the map from block means where the tokens of a block are alike, and computes what it cannot predict."""

    paper = Paper(
        "P085",
        "SpargeAttn: Accurate Sparse Attention Accelerating Any Model Inference",
        "Jintao Zhang, Chendong Xiang, Haofeng Huang, Jia Wei, Haocheng Xi, Jun Zhu, Jianfei Chen",
        2025,
        "2502.18137",
        "ICML 2025",
        differs=(
            "The first stage alone: products of weights and values that are small against the running maximum are not "
            "skipped, and nothing is rounded to 8 bits.",
            "Blocks are square, 64 x 64; the authors take 128 queries by 64 keys.",
            "The block with which the sum reaches `mass` is computed too, so that mass = 1 is dense; theirs is not.",
            "The block of a query's own key is always computed.",
            "Thresholds are given, and the same for all heads; the authors may search them for each head.",
            "A text of which more than `most` (90 %) of the blocks would be computed stays dense, being faster so.",
        ),
    )
    one_text = True
    mass: PositiveShare = 0.98  # share of the predicted weight that is computed; the authors' tau: 0.98
    # mean cosine between a block's tokens below which it is always computed; their code: 0.6
    alike: Annotated[float, Interval(ge=-1, le=1)] = 0.6

    sink: bool = True  # the first block is always computed; an option of the authors' code, off there

    @classmethod
    def neutral(cls) -> SpargeAttn:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> SpargeAttn:
        return cls(0.5, -1.0, False, block=4, most=1.0)

    def choose(self, grid: Grid) -> Tensor:
        query, key = grid.query, grid.key
        whole = means(key.flatten(2, 3)[:, :, None], grid.cols.flatten(2, 3)[:, :, None])
        key = key - whole[..., None, :]  # what all keys share moves no score against another
        like_query = self.like(query, grid.rows)[..., None]
        like_key = grid.call.spread(self.like(key, grid.cols))[:, :, None]
        weight = grid.pooled(means(query, grid.rows), means(key, grid.cols), grid.open & like_key)
        table = cover(weight, self.mass) | ~like_query | ~like_key
        table[..., 0] |= self.sink
        return table

    def like(self, x: Tensor, is_text: Tensor) -> Tensor:
        """Where the mean cosine of any two tokens of a block, each with itself too, is above `alike`, `[b h n]`."""
        if self.alike < 0:  # that mean is the square of the mean unit vector
            return torch.ones_like(x[..., 0, 0], dtype=torch.bool)
        return means(normalize(x, dim=-1), is_text).square().sum(-1) > self.alike


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, SpargeAttn(0.9)) as run:
        print(run.difference(**text))
        print(run.activity())
