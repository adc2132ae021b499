"""The fewest key blocks that get the share `mass` of a sample of true rows, and a window of a share of the text."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare, Share
from heedful.kit.blocks import BlockSparse, Grid, cover


class SampleAttention(BlockSparse):
    """Computes some rows of the map as they are; the columns on which these look are computed for all rows."""

    paper = Paper(
        "P100",
        "SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive Structured Sparse "
        "Attention",
        "Qianchao Zhu, Jiangfei Duan, Chang Chen, Siran Liu, Xiuhong Li, Guanyu Feng, Xin Lv, Huanqi Cao, Xiao "
        "Chuanfu, Xingcheng Zhang, Dahua Lin, Chao Yang",
        2024,
        "2406.15486",
        "MLSys 2025",
        differs=(
            "Stripes are blocks of 64 keys and not single keys, since a kernel skips whole blocks.",
            "The sampled rows are every 20th from the first of the text; how the authors space theirs was not verified "
            "nor their code, which was not found.",
        ),
    )
    one_text = True
    mass: PositiveShare = 0.95  # share of the sampled rows' weight that is computed; the paper's alpha: 0.95
    rows: PositiveShare = 0.05  # share of rows that are sampled; the paper: 0.05
    window: Share = 0.08  # share of the text that each query sees behind itself; the paper: 0.08

    @classmethod
    def neutral(cls) -> SampleAttention:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> SampleAttention:
        return cls(0.4, 0.3, 0.0, block=4, most=1.0)

    def choose(self, grid: Grid) -> Tensor:
        n, m = grid.open.shape[-2:]
        at = torch.arange(0, n * self.block, max(1, round(1 / self.rows)), device=grid.open.device)[None]
        received = grid.query.new_zeros(*grid.query.shape[:2], m)
        for weights, _ in grid.weights(at):
            received[..., : weights.shape[3]] += weights.sum(2).sum(-1)
        width = (self.window * (grid.length + grid.start)).ceil().long()
        return cover(received, self.mass)[..., None, :] | grid.band(width)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, SampleAttention(0.8)) as run:
        print(run.difference(**text))
        print(run.activity())
