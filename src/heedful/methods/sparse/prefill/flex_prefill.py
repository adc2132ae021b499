"""By the last queries: vertical and slash blocks up to the share `mass`, or block means where these predict well."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveShare, Share
from heedful.kit.blocks import BlockSparse, Grid, cover, means
from heedful.kit.budget import all_fit


class FlexPrefill(BlockSparse):
    """Each head shows by the last block of queries whether it is vertical-slash or can be told from block means."""

    paper = Paper(
        "P186",
        "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        "Xunhao Lai, Jianqiao Lu, Yao Luo, Yiyuan Ma, Xun Zhou",
        2025,
        "2502.20766",
        "ICLR 2025",
        differs=(
            "Blocks of 64 tokens; the authors' default is 128.",
            "Of a head that goes by block means the fewest blocks that reach `mass` are taken, over all of its rows as "
            "theirs; the block that crosses it is computed too.",
            "Only attention that is causal is thinned out: a slash has no meaning elsewhere.",
            "A text of which more than `most` (90 %) of the blocks would be computed stays dense, being faster so.",
        ),
    )
    one_text = True
    mass: PositiveShare = 0.95  # share of the weight that is computed; the authors' gamma: 0.9 to 0.95
    tau: Share = 0.1  # root of the Jensen-Shannon divergence below which block means are trusted; the authors: 0.1
    least: NonNegativeInt = 1024  # tokens that vertical and slash blocks span at least; the paper: 1024

    @classmethod
    def neutral(cls) -> FlexPrefill:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> FlexPrefill:
        return cls(0.5, 0.1, 0, block=4, most=1.0)

    def rests(self, tokens: int) -> str | None:
        return all_fit(max(2 * self.block, self.least), tokens, "a smaller least, or block,")

    def choose(self, grid: Grid) -> Tensor | None:
        if not grid.call.mask.causal:
            return None
        n, m = grid.open.shape[-2:]
        at = grid.length[:, None] - self.block + torch.arange(self.block, device=grid.open.device)
        ((weights, _),) = grid.weights(at, self.block)
        weights = weights.flatten(3)
        behind = (0, m * self.block - weights.shape[3])
        vertical = torch.nn.functional.pad(weights.mean(2), behind)
        slash = torch.nn.functional.pad(self.by_distance(weights, at + grid.start[:, None]), behind)
        blocks = vertical.unflatten(-1, (m, self.block)).sum(-1)
        trusted = self.divergence(blocks, self.estimate(grid, at)).sqrt() < self.tau
        table = self.best(vertical, blocks, trusted)[..., None, :].expand(-1, -1, n, -1)
        far = self.best(slash, slash.unflatten(-1, (m, self.block)).sum(-1), trusted)
        rows = torch.arange(1, n + 1, device=at.device) * self.block - 1 + grid.start[:, None]
        apart = rows[:, None, :, None] // self.block - torch.arange(m, device=at.device)
        there = apart.clamp(0, m - 1).expand(len(far), far.shape[1], -1, -1)
        table = table | (far[..., None, :].expand(there.shape).gather(-1, there) & (apart >= 0))
        if bool(trusted.any()):
            pooled = grid.pooled(means(grid.query, grid.rows), means(grid.key, grid.cols))[trusted]
            table[trusted] |= cover(pooled.flatten(1), self.mass).view_as(pooled)
        short = grid.length + grid.start <= max(2 * self.block, self.least)
        return table | short[:, None, None, None]

    def best(self, weight: Tensor, blocks: Tensor, trusted: Tensor) -> Tensor:
        """Which blocks `[b h m]` are taken, the first always: as many as the fewest tokens up to `mass` would fill."""
        least = -(-self.least // self.block)
        count = (cover(weight, self.mass).sum(-1) // self.block + 1).clamp(min=least).masked_fill(trusted, least)
        ranked = blocks.clone()
        ranked[..., 0] = torch.inf
        place = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return place < count[..., None].clamp(min=1)

    @staticmethod
    def by_distance(weights: Tensor, own: Tensor) -> Tensor:
        """The mean weight `[b h k]` at each distance behind the rows, whose own keys stand at `own [b|1 r]`.

        The rows follow one another and no key follows its query, so that a diagonal is a column of the same numbers
        read with rows one longer. One that begins left of the first column runs through zeros of the row above.
        """
        b, h, r, k = weights.shape
        steps, flat = (h * r * k, r * k, k + 1, 1), weights.contiguous()
        right = flat.as_strided((b, h, r, k - r + 1), steps).sum(2)
        left = flat.as_strided((b, h, r - 1, r - 1), steps, flat.storage_offset() + k - r + 2).sum(2)
        at = own[:, :1] - torch.arange(k, device=own.device) + r - 1  # the first row's column, from the leftmost on
        there = at.clamp(0, k - 1)[:, None].expand(b, h, -1)
        return torch.cat([left, right], -1).gather(-1, there).masked_fill((at < 0)[:, None], 0) / r

    @staticmethod
    def estimate(grid: Grid, at: Tensor) -> Tensor:
        """What block means say about the last rows `at`: softmax over blocks, `[b h m]`."""
        query = grid.query.flatten(2, 3).transpose(1, 2)
        texts = torch.arange(len(query), device=at.device)[:, None]
        there = (at >= 0).expand(len(query), -1)[..., None, None]
        last = (query[texts, at.clamp(min=0)] * there).sum(1) / there.sum(1).clamp(min=1)
        scores = grid.scores(last[:, :, None], grid.call.spread(means(grid.key, grid.cols)))
        empty = ~grid.cols.any(-1)[:, :, None]
        return scores.masked_fill(empty, torch.finfo(scores.dtype).min).softmax(-1)[:, :, 0]

    @staticmethod
    def divergence(p: Tensor, q: Tensor) -> Tensor:
        """The Jensen-Shannon divergence in nats of two distributions `[b h m]`, the first normalised here, `[b h]`."""
        p = p / p.sum(-1, keepdim=True).clamp(min=1e-12)
        middle = (p + q) / 2
        apart = [torch.xlogy(x, x / middle.clamp(min=1e-30)).sum(-1) for x in (p, q)]
        return ((apart[0] + apart[1]) / 2).clamp(min=0)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, FlexPrefill(0.9, least=128)) as run:
        print(run.difference(**text))
        print(run.activity())
