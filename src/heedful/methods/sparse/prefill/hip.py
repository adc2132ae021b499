"""The best k keys by a tree: score the first block of each of 2k branches, keep k, halve them, down to blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.kit.blocks import Grid
from heedful.kit.budget import all_fit
from heedful.kit.stripes import StripeSparse


class HiP(StripeSparse):
    """Neighbouring keys score alike, so a branch of the text is judged by one block of it and pruned or split."""

    paper = Paper(
        "P149",
        "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        "Heejun Lee, Geon Park, Youngwan Lee, Jina Kim, Wonyoung Jeong, Myeongjae Jeon, Sung Ju Hwang",
        2024,
        "2406.09827",
        "ICLR 2025",
        differs=(
            "A branch is judged by its first block of keys, as in version 1.1 of the authors' code; the paper's text "
            "speaks of a token of each chunk.",
            "Branches are as even as can be, and the first tokens are searched too; version 1.1 rounds where branches "
            "begin, and begins behind the first tokens.",
            "Calls that are not causal keep all keys that lie behind a block of queries.",
            "All queries of a block have a say; the authors' code asks every second one.",
            "Each query head has a tree of its own, and every layer prunes; the authors leave the first layers dense.",
            "Defaults and the first tokens, which always stay, are those of version 1.1 of the authors' code.",
        ),
    )
    one_text = True
    keep: int = 512  # keys that a block of queries sees beside window and sinks; the authors: 512
    leaf: PositiveInt = 2  # keys in a leaf of the tree; the authors: 2
    # newest keys, up to the block's last query, that are always seen; the authors' code: 256
    window: NonNegativeInt = 256
    sinks: NonNegativeInt = 16  # first keys that are always seen; the authors' code: 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < self.leaf or self.keep % self.leaf:
            good = max(1, self.keep // self.leaf) * self.leaf
            raise FieldError(self, "keep", self.keep, f"must be a multiple of the leaf of {self.leaf} keys", good)

    @classmethod
    def neutral(cls) -> HiP:
        return cls(keep=2**20)

    @classmethod
    def example(cls) -> HiP:
        return cls(keep=2, leaf=1, window=2, sinks=1, block=3)

    def rests(self, tokens: int) -> str | None:
        return all_fit(self.keep + self.window, tokens, "a smaller keep or window")

    def idle(self, call: Call) -> bool:
        return call.cross or len(call.keys) <= self.keep + self.window

    def choose(self, grid: Grid) -> Tensor:
        n, col = grid.query.shape[2], torch.arange(grid.cols.shape[2] * self.block, device=grid.open.device)
        ends = (self.block * (torch.arange(n, device=col.device) + 1)).minimum(grid.length[:, None])
        far = (grid.start[:, None] + ends - self.window).clamp(min=0)  # [b|1 n], the keys before the window
        table = (col >= far[..., None]) | (col < self.sinks)
        leaves = -(-far // self.leaf)
        chosen = self.search(grid, leaves)[..., None] * self.leaf + torch.arange(self.leaf, device=col.device)
        chosen = chosen.flatten(3).clamp(max=len(col) - 1)
        found = torch.zeros(*chosen.shape[:3], len(col), dtype=torch.bool, device=col.device)
        return found.scatter_(-1, chosen, True) | (table | (far <= self.keep)[..., None])[:, None]

    def search(self, grid: Grid, leaves: Tensor) -> Tensor:
        """The numbers of the best blocks `[b h n keep/leaf]` among the first `leaves [b|1 n]`."""
        nodes = self.keep // self.leaf
        leaves = leaves.clamp(min=nodes)[:, None, :, None].expand(len(grid.query), grid.query.shape[1], -1, -1)
        ends = torch.arange(nodes + 1, device=leaves.device) * leaves // nodes
        first, width = ends[..., :-1], ends.diff()
        while bool((width > 1).any()):
            half = width // 2
            both = torch.stack([first, first + half], -1).flatten(-2)
            widths = torch.stack([half, width - half], -1).flatten(-2)
            score = self.score(grid, both).masked_fill(widths < 1, -torch.inf)
            best = score.topk(nodes).indices
            first, width = both.gather(-1, best), widths.gather(-1, best)
        return first

    def score(self, grid: Grid, number: Tensor) -> Tensor:
        """The best score of a query in each block with a key in the blocks `number [b h n m]`."""
        key = grid.call.spread(grid.key.flatten(2, 3))
        place = (number[..., None] * self.leaf + torch.arange(self.leaf, device=number.device)).flatten(2)
        place = place.clamp(max=key.shape[2] - 1)[..., None].expand(-1, -1, -1, key.shape[3])
        found = key.gather(2, place).view(*number.shape[:3], -1, key.shape[3])
        scores = (grid.query @ found.mT).masked_fill(~grid.rows[..., None], -torch.inf)
        return scores.amax(-2).unflatten(-1, (-1, self.leaf)).amax(-1)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, HiP(64, window=32, block=32)) as run:
        print(run.difference(**text))
        print(run.activity())
