"""Softmax over a row's own block and the landmarks of blocks before; a landmark's weight goes to its block's tokens."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from heedful.authoring import Call, Mask, Method, NonNegativeInt, Paper, Site, at, reads
from heedful.core.flags import at_least, both, lowered, same, some, zeroed
from heedful.core.positions import Positions, spread_heads
from heedful.kit.told import at_places, token_ids
from heedful.methods.mechanisms.normalise._grouped import Groups


class LandmarkAttention(Method):
    """The last token of each block stands for it: who looks at it looks into the block. For models trained with it.

    A query that has nothing before it in its block and no landmark gets nothing, as in the authors' code.
    """

    paper = Paper(
        "P193",
        "Landmark Attention: Random-Access Infinite Context Length for Transformers",
        "Amirkeivan Mohtashami, Martin Jaggi",
        2023,
        "2305.16300",
        "NeurIPS 2023",
        differs=(
            "Where the text has no landmark tokens, every N-th token serves as one and is not looked at itself; the "
            "authors insert a token of their own, which is what `tokens` is for.",
            "Blocks that a query does not choose have no weight, but their keys are read; what fetching few of them "
            "saves is not saved here.",
            "Every query chooses blocks in each head by itself, and keys keep their positions; for texts longer than "
            "in training the authors' code moves chosen blocks to positions that were seen there.",
            "`blocks` are of all blocks before a query's own; the authors read a text in stretches, look at all of the "
            "stretch that is read, and choose among the blocks before it.",
        ),
    )
    # tokens of a block, with its landmark; the authors' LLaMA: 50 and the landmark
    every: Annotated[int, Ge(2)] = 51
    tokens: tuple[
        NonNegativeInt, ...
    ] = ()  # landmark tokens, which end blocks wherever they stand; (): every N-th token does
    blocks: NonNegativeInt | None = None  # a query's and head's highest landmarks that count; None: all, as in training

    @classmethod
    def example(cls) -> LandmarkAttention:
        return cls(4, blocks=2)

    @reads(Site.MASK, when="tokens")
    def find(self, mask: Mask, call: Call) -> None:
        """Leave for the tiles which tokens of the text so far are landmarks, by index."""
        ids = token_ids(call)
        marks = torch.isin(ids, torch.tensor(self.tokens, dtype=ids.dtype, device=ids.device))
        call.state.forward[call.name] = marks.long()

    def placed(self, places: Positions, call: Call) -> tuple[Tensor, Tensor]:
        """The block of each place, and whether it is its landmark, `[b|1 g|1 n]`."""
        if not self.tokens:
            return places.position // self.every, places.position % self.every == self.every - 1
        marks: Tensor = call.state.forward[call.name]
        return at_places(marks.cumsum(-1) - marks, places), at_places(marks, places) > 0

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        asking = spread_heads(self.placed(call.queries, call)[0], call.heads)[..., None].int()
        giving, mark = (spread_heads(x, call.heads)[..., None, :] for x in self.placed(call.keys, call))
        keep = mark.new_ones(scores.shape[-1]) if call.keep is None else call.keep
        # a block's keys follow one another, however many a cache dropped
        blocks = pad(giving.diff(dim=-1).ne(0), (1, 0)).cumsum(-1)
        sizes = blocks.new_zeros(*blocks.shape[:-1], int(blocks.max()) + 1)
        sizes = sizes.scatter_add(-1, blocks, torch.ones_like(blocks))
        last = (sizes.cumsum(-1) - 1).expand(*scores.shape[:-1], -1)  # of each block, where its landmark stands
        marks = both(both(keep, mark), at_least(asking - 1, giving.int())).expand_as(scores).gather(-1, last)
        marks = both(marks, sizes > 0)  # other texts may have more blocks
        of_marks, seen = scores.gather(-1, last), both(keep, ~mark)
        if self.blocks is not None:
            marks = marks & _highest(of_marks, marks, self.blocks)
        own = both(seen, same(giving.int(), asking)).expand_as(scores)
        there = some(own.flatten(0, -2), 0).nonzero()[:, 0]  # columns of some row's own block
        near = slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)
        own = own[..., near]
        first = torch.cat([lowered(scores[..., near], own), lowered(of_marks, marks)], -1).softmax(-1)
        first, share = first.split([own.shape[-1], marks.shape[-1]], -1)
        found = Groups.of(blocks).softmax(scores, seen, zeroed(share, marks))
        return found + pad(zeroed(first, own), (near.start, scores.shape[-1] - near.stop))


def _highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Which of these columns are a row's highest, so many of them."""
    ranked = scores.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranked < count


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, LandmarkAttention(4)) as run:
        print(run.difference(**inputs))
