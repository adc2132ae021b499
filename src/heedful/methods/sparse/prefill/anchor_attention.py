"""Keys j with mean(q) k_j >= mean(a) - theta, a being a query's best score among the first keys and its own group's."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt
from heedful.kit.blocks import Grid, hide, means
from heedful.kit.stripes import StripeSparse


class AnchorAttention(StripeSparse):
    """What the first keys and the nearest ones score is an anchor: keys that come near it are computed, one by one."""

    paper = Paper(
        "P111",
        "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
        "Yu Zhang, Dong Guo, Fang Wu, Guoliang Zhu, Dian Ding, Yiming Zhang",
        2025,
        "2505.23520",
        "EMNLP 2025",
        differs=(
            "The first keys of an anchor are one block, and blocks have 64 tokens where nothing else is said; the "
            "newest of the authors' kernels take as many first keys as a group holds, and their blocks have 128.",
            "Calls that are not causal keep all keys that lie behind a group's first query.",
            "Keys right before the group are candidates; the authors' code leaves out the last block before it.",
            "A text of any length is cut into groups; the authors' needs whole ones.",
            "Scores are computed in float32; the authors' kernel rounds them to 16 bits before it compares.",
        ),
    )
    one_text = True
    theta: float = 12.0  # how far below the anchor a key may score; the authors: 12
    step: PositiveInt = 16  # blocks of queries that share their keys; the authors: 16 of 128 queries

    @classmethod
    def neutral(cls) -> AnchorAttention:
        return cls(block=2**20)

    @classmethod
    def example(cls) -> AnchorAttention:
        return cls(-0.5, 2, block=3)

    @property
    def group(self) -> int:
        return self.block * self.step

    def rests(self, tokens: int) -> str | None:
        whole = self.block + self.group
        told = f"the first block and a group of queries hold {whole} tokens, and the text has {tokens}: "
        return f"{told}a smaller block would act" if tokens <= whole else None

    def idle(self, call: Call) -> bool:
        return super().idle(call) or len(call.keys) <= self.block

    def choose(self, grid: Grid) -> Tensor:
        key, mean = grid.key.flatten(2, 3), means(grid.query, grid.rows)
        col = torch.arange(key.shape[2], device=key.device)
        first = col < self.block
        tables = []
        for block in range(0, grid.query.shape[2], self.step):
            part = slice(block, block + self.step)
            start = grid.start + block * self.block  # the column of the group's first key, [b|1]
            near = col >= start[:, None]
            above = grid.scores(mean[:, :, part], grid.call.spread(key))
            above = above - self.anchor(grid, part, key, first, near)[..., None]
            above = above.masked_fill(~grid.rows[:, :, part].any(-1)[..., None], -torch.inf)
            tables.append(self.near_enough(above.amax(2), (first | near)[:, None]))
        return torch.stack(tables, 2)

    def near_enough(self, above: Tensor, sure: Tensor) -> Tensor:
        """The keys of a group, by how far above the anchor they score `[b h k]`, and those that are seen anyway."""
        return (above >= -self.theta) | sure

    def anchor(self, grid: Grid, part: slice, key: Tensor, first: Tensor, near: Tensor) -> Tensor:
        """The mean, over the text in each block of a group, of a query's best score `[b h step]` on first and near."""
        ranges, is_text = grid.ranges[:, :, part], grid.rows[:, :, part]
        here = (first | near.any(0)).nonzero().flatten()
        here = here[here < max(self.block, int(ranges.max()))]  # nobody in the group sees what lies behind
        query = grid.query[:, :, part]
        scores = grid.scores(query, grid.call.spread(key[:, :, here])[:, :, None])
        seen = ((here >= ranges[..., :1]) & (here < ranges[..., 1:])).any(-2)
        hide(scores, ~(seen & (first | near)[:, None, None, None, here]))
        best = scores.amax(-1).masked_fill(~is_text, 0.0)
        return best.sum(-1) / is_text.sum(-1).clamp(min=1)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, AnchorAttention(4.0, 4, block=32)) as run:
        print(run.difference(**text))
        print(run.activity())
