"""Some layers see all and note their top key blocks; the layers after them see those blocks alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Readings
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.kit.batches import at_least_one, read
from heedful.kit.blocks import BlockSparse, Grid

PAPER = Paper(
    "P332",
    "HyLRA: Hybrid Layer Reuse Attention for Efficient Long-Context Inference",
    "Xuan Ai, Qingqing Yang, Peng Wang, Lei Deng, Lin Zhang, Renhai Chen, Gong Zhang",
    2026,
    "2602.00777",
    "arXiv",
    differs=(
        "Only the paper's abstract could be read. Readers of the rest tell that its programme wants the fewest full "
        "layers whose top keys each layer behind them shares to some part at least, and of such the most that is "
        "shared; here the number of full layers is given, and the most is shared.",
        "No layer is full for being sensitive: what a layer's output loses by few keys is not measured.",
        "It reuses key blocks for blocks of queries, while the prompt is read; decoding sees everything.",
        "A layer's top blocks are those of the mean of its heads, from four true rows a block.",
        "Blocks are lent to layers of the same mask alone: others, as full layers behind one with a window, see all.",
    ),
)


def block_map(grid: Grid) -> Tensor:
    """The mean weight that some true rows of each block give to each key block, over heads, `[b 1 n m]`."""
    n, m = grid.open.shape[-2:]
    step = max(1, grid.size // 4)
    at = torch.arange(step - 1, n * grid.size, step, device=grid.open.device)[None]
    out = grid.query.new_zeros(len(grid.query), n, m)
    for weights, rows in grid.weights(at):
        mean = weights.sum(-1).mean(1)
        out[..., : mean.shape[-1]].index_add_(1, rows[0] // grid.size, mean)
    return out[:, None]


def best(weight: Tensor, grid: Grid, keep: float) -> Tensor:
    """The share `keep` of each row's open blocks that weigh most, `[b 1 n m]`."""
    room = (keep * grid.open.any(1, keepdim=True).sum(-1, keepdim=True)).ceil()
    return weight.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < room


def lent(call: Call, name: str, grid: Grid) -> Tensor | None:
    """The blocks that a layer left under this name; None where its mask opens other blocks than this one's."""
    table, opened = call.state.forward.get(name, (None, None))
    return table if opened is not None and torch.equal(opened, grid.open) else None


class HyLRA(BlockSparse):
    """A dynamic programme over a profile chooses the layers that see all; the others reuse their key blocks."""

    paper = PAPER
    one_text = True
    share: PositiveShare = 0.25  # of blocks that a reusing layer computes
    full: tuple[NonNegativeInt, ...] | None = None  # layers that see all; None: every fourth, until fit() has chosen
    whole: PositiveShare = 0.25  # share of layers that fit() lets see all

    @classmethod
    def neutral(cls) -> HyLRA:
        return cls(most=0.0)

    @classmethod
    def example(cls) -> HyLRA:
        return cls(0.3, (0,), block=4, most=1.0)

    def choose(self, grid: Grid) -> Tensor | None:
        call = grid.call
        if call.layer % 4 == 0 if self.full is None else call.layer in self.full:
            call.state.forward["table"] = best(block_map(grid), grid, self.share), grid.open
            return None
        return lent(call, "table", grid)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> HyLRA:
        """Choose the full layers by how many of its top blocks each layer shares, on these texts, with those before."""
        missed: Mapping[int, Tensor] = read(context, _Missed(self.share, self.block), at_least_one(self, batches))
        cost = torch.stack([missed[layer] for layer in sorted(missed)], 1)
        return replace(self, full=cheapest(cost, max(1, round(self.whole * len(cost)))))


def cheapest(cost: Tensor, count: int) -> tuple[int, ...]:
    """The `count` layers, the first among them, with the least sum of `cost[full, layer]` over what follows each."""
    depth = len(cost)
    after = cost.triu(1).cumsum(1)  # of all layers behind a full one, up to some layer
    best: list[tuple[float, tuple[int, ...]]] = [(float(after[0, i]), (0,)) for i in range(depth)]  # of layers 0 to i
    for _ in range(count - 1):
        best = [
            min([best[i], *((best[j - 1][0] + float(after[j, i]), (*best[j - 1][1], j)) for j in range(1, i + 1))])
            for i in range(depth)
        ]
    return best[-1][1]


class _Missed(Method):
    """The share of a layer's best blocks that are not among those of each layer before it, `[layers]`."""

    share: float = 0.25
    size: int = 64

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @reads(Site.MASK)
    def look(self, mask: Mask, call: Call) -> Mean | None:
        grid = Grid.of(replace(call, mask=mask), self.size)
        if grid is None:
            return None
        weight = block_map(grid)
        rows = weight.sum(-1) > 0
        own = best(weight, grid, self.share)
        call.state.forward[str(call.layer)] = own, grid.open
        missed = torch.zeros(call.depth, dtype=torch.float64)
        for layer in range(call.layer + 1):
            table = lent(call, str(layer), grid)
            if table is not None:
                missed[layer] = (1 - (own & table).sum(-1) / own.sum(-1))[rows].sum()
        return Mean.of(missed, float(rows.sum()))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: mean.value for layer, mean in readings.items()}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 40, return_tensors="pt")
    method = fit(HyLRA(), model, [text])
    print(method)
    with attach(model, method) as run:
        print(run.difference(**text))
