"""i sees j where i // n = j // n; in the last layers also i mod n = j mod n = 0: the chunks' first tokens meet."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.budget import all_fit


class HierarchicalChunks(Method):
    """A long text is read in chunks, each by itself, and their first tokens tell one another in the last layers.

    Read the answer off the first tokens of chunks: off their maximum over channels, or off the first of all. For
    encoders, trained with it.
    """

    paper = Paper(
        "P265",
        "Revisiting Transformer-based Models for Long Document Classification",
        "Xiang Dai, Ilias Chalkidis, Sune Darkner, Desmond Elliott",
        2022,
        "2204.06683",
        "Findings of EMNLP 2022",
        differs=(
            "One encoder whose last layers are the second level; the authors put two new layers over a pretrained "
            "encoder. All its layers read on within the chunks; theirs see the chunks' states alone.",
            "Chunks stand side by side; the authors' overlap by a quarter, which reads some tokens twice.",
            "Positions go on through the text; to the authors each chunk begins anew, and is told its number.",
            "Each chunk's first token speaks for it; the authors put a token of its own before it.",
            "Windows with global tokens, which they compare with this, are PrefixGlobal here.",
        ),
    )
    chunk: PositiveInt = 128  # n, tokens; the paper: 64 to 512, best 128
    levels: NonNegativeInt = 2  # last layers in which the first tokens of chunks meet; the paper: 2

    @classmethod
    def neutral(cls) -> HierarchicalChunks:
        return cls(1 << 30)

    @classmethod
    def example(cls) -> HierarchicalChunks:
        return cls(3, 1)

    def rests(self, tokens: int) -> str | None:
        return all_fit(self.chunk, tokens, f"chunk={tokens // 4}")

    def idle(self, call: Call) -> bool:
        return call.cross or int(call.k_pos.max()) < self.chunk  # all in one chunk

    @at(Site.MASK)
    def part(self, mask: Mask, call: Call) -> Mask:
        meet = call.listed.stop - call.layer <= self.levels

        def sees(query: Tensor, key: Tensor) -> Tensor:
            (mine, place), (theirs, other) = (
                (torch.div(x, self.chunk, rounding_mode="floor"), x % self.chunk) for x in (query, key)
            )
            return (mine == theirs) | ((place == 0) & (other == 0)) if meet else mine == theirs

        return mask & Where(sees)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.encoder()
    text = tokenizer("The sun rises in the east and sets in the west. " * 10, return_tensors="pt")
    with attach(model, HierarchicalChunks(16)) as run:
        print(run.difference(**text))
        print(run.activity())
