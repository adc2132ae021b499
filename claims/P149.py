"""HiP: does a tree of a few scored keys find what a text looks at, better than the nearest keys or any?"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from claims._sparse import calls, loss, pairs, text, weights
from claims.ledger import Claim, run
from heedful.kit.blocks import Grid
from heedful.methods.sparse.prefill.hip import HiP

TOKENS, KEEP, WINDOW, SINKS, SIZE = 1024, 128, 64, 4, 32


class Blind(HiP):
    """The control: the same tree, whose branches are pruned by chance."""

    def score(self, grid: Grid, number: Tensor) -> Tensor:
        return torch.rand(number.shape, generator=torch.Generator().manual_seed(grid.call.layer))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    inputs = text(seed, TOKENS)
    found, dense = calls(inputs)
    ways = {
        "tree": HiP(KEEP, 2, WINDOW, SINKS, block=SIZE),
        "window": HiP(2, 2, WINDOW + KEEP, SINKS, block=SIZE),
        "blind tree": Blind(KEEP, 2, WINDOW, SINKS, block=SIZE),
    }
    rows: list[dict[str, float]] = []
    for call in found[::3]:
        true, row = weights(call), {}
        for name, method in ways.items():
            kept = pairs(method, call)
            row[f"weight kept, {name}"] = float((true * kept).sum(-1).mean())
            row[f"keys a query, {name}"] = float(kept.sum(-1).float().mean())
        rows.append(row)
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    numbers["loss, dense"] = dense
    numbers |= {f"loss, {name}": loss(inputs, method) for name, method in ways.items()}
    others = max(numbers["weight kept, window"], numbers["weight kept, blind tree"])
    return numbers["weight kept, tree"] - others, numbers


CLAIM = Claim(
    key="P149",
    method="HiP",
    says="A tree search over representative keys finds the keys that matter at O(T log T).",
    paper_number="none given in the abstract: little or no degradation of what is generated",
    setup=f"SmolLM2-135M, texts of {TOKENS} tokens, every third layer's own queries and keys, {KEEP} keys found for "
    f"each block of {SIZE} queries beside a window of {WINDOW} and {SINKS} first ones: the weight kept, mean over "
    f"rows, heads and layers, against the better of a window wider by {KEEP} and the same tree pruned by chance.",
    effect="share of the attention weight kept, over the better control",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
