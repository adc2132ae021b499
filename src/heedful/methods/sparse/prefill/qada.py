"""Far keys are left where log T + q.mu + q'Sigma q / 2, their predicted log-sum, stays below that of near keys."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt, Share
from heedful.kit.blocks import BlockSparse, Grid, hide, means


class QAdA(BlockSparse):
    """Predicts, for each head and query, from the mean and covariance of far keys whether it needs any of them."""

    paper = Paper(
        "P072",
        "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification",
        "Konstantin Donhauser, Charles Arnal, Mohammad Pezeshki, Vivien Cabannes, David Lopez-Paz, Kartik Ahuja",
        2025,
        "2502.09647",
        "arXiv",
        differs=(
            "One decision a block of queries, by the mean of their predicted shares; the paper decides query by query.",
            "Moments are those of the far keys of each block themselves; the paper takes them from a whole prompt.",
            "Sinks and window are rounded up to whole blocks.",
            "A soft cap that a model lays on its scores does not count in the predicted share.",
            "The paper's code was not found, nor was its text at hand when this was read again: its default threshold "
            "was not verified.",
        ),
    )
    one_text = True
    share: Share = 0.9  # predicted share of the weight on sinks and window from which a block of queries is local
    window: PositiveInt = 128  # tokens behind a query that count as near; the paper: 128
    sinks: NonNegativeInt = 16  # tokens at the beginning that count as near; the paper: 16

    @classmethod
    def neutral(cls) -> QAdA:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> QAdA:
        return cls(0.0, 2, 1, block=4, most=1.0)

    def choose(self, grid: Grid) -> Tensor:
        m = grid.open.shape[-1]
        sinks = torch.arange(m, device=grid.open.device) * self.block < self.sinks
        near = (grid.band(self.window) | sinks) & grid.open
        local = means(self.shares(grid, near)[..., None], grid.rows)[..., 0] >= self.share
        return near | ~local[..., None]

    def shares(self, grid: Grid, near: Tensor) -> Tensor:
        """The predicted share of each query's weight on its near blocks `[b|1 h|1 n m]`, `[b h n size]`."""
        return torch.sigmoid(self.near_mass(grid, near) - self.far_mass(grid, grid.open & ~near))

    def far_mass(self, grid: Grid, far: Tensor) -> Tensor:
        """The log of what far keys add up to if scores are Gaussian, `[b h n size]`."""
        keys = grid.key * grid.cols[..., None]
        d = keys.shape[-1]
        far = far.any(1, keepdim=True).to(keys.dtype)
        count = far @ grid.cols.sum(-1).to(keys.dtype)[..., None]  # [b|1 1 n 1]
        weight = far / count.clamp(min=1)
        mean = weight @ keys.sum(-2)
        second = (weight @ (keys.mT @ keys).flatten(-2)).unflatten(-1, (d, d))
        spread = second - mean[..., None] * mean[..., None, :]
        scale, query = grid.call.scale, grid.grouped
        bulk = query @ (scale**2 / 2 * spread)
        bulk += scale * mean[..., None, :]
        bulk *= query
        return count.log() + grid.apart(bulk.sum(-1))

    def near_mass(self, grid: Grid, near: Tensor) -> Tensor:
        """The log of what the keys of near blocks add up to, `[b h n size]`; a few blocks of rows at a time."""
        key, query = grid.call.scale * grid.key.transpose(1, 2), grid.grouped
        b, g = query.shape[:2]
        near = near.any(1, keepdim=True).expand(b, -1, -1, -1)[:, 0]
        texts = torch.arange(b, device=key.device)[:, None, None]
        inside = torch.arange(self.block, device=key.device)
        out = []
        for rows in torch.arange(near.shape[1], device=key.device).split(4):
            there, blocks = near[:, rows].sort(dim=-1, descending=True, stable=True)  # those that are, in their order
            most = max(1, int(there.sum(-1).max()))
            there, blocks = there[..., :most], blocks[..., :most]
            k = key[texts, blocks].movedim(3, 1).flatten(3, 4)  # [b g r c*size d]
            scores = query[:, :, rows] @ k.mT
            cols = (blocks[..., None] * self.block + inside).flatten(2)[:, None, :, None, :, None]
            see = grid.ranges[:, :, rows][:, :, :, :, None]  # [b|1 h|1 r size 1 n 2]
            seen = ((cols >= see[..., 0]) & (cols < see[..., 1])).any(-1)
            seen = seen & there.repeat_interleave(self.block, -1)[:, None, :, None]
            seen = seen.unflatten(1, (min(g, seen.shape[1]), -1)).transpose(2, 3)  # [b g|1 r h/g|1 size c*size]
            hide(scores.unflatten(3, (-1, self.block)), ~seen)
            highest = scores.softmax(-1).amax(-1)  # is 1 over the sum that logsumexp takes; faster than its own exp
            out.append(scores.amax(-1) - highest.log())
        return grid.apart(torch.cat(out, 2))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, QAdA(0.8)) as run:
        print(run.difference(**text))
        print(run.activity())
