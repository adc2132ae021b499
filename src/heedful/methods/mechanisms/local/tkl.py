"""Tokens of a chunk see it and `overlap` tokens before and behind it."""

from __future__ import annotations

from heedful.authoring import Call, Mask, Method, NonNegativeInt, Paper, PositiveInt, Site, at
from heedful.kit.chunks import Chunk


class TKL(Method):
    """Chunks of a long document see themselves and a few tokens around, at a cost that is linear in its length."""

    paper = Paper(
        "P074",
        "Local Self-Attention over Long Text for Efficient Document Retrieval",
        "Sebastian Hofstätter, Hamed Zamani, Bhaskar Mitra, Nick Craswell, Allan Hanbury",
        2020,
        "2005.04908",
        "SIGIR 2020",
        differs=(
            "The local self-attention alone: the matches of a query's terms, their saturation and the best regions of "
            "a document are left out.",
            "The authors take a chunk with what is around it through all layers and keep the chunk; here a token on a "
            "chunk's border has its own surroundings in each layer, so that several layers see further. In the first "
            "layer both are the same.",
            "Positions are the model's; the authors' begin again at 0 in every chunk, with what is around it.",
            "What is not computed is left out by the mask, not by packing chunks.",
        ),
    )
    chunk: PositiveInt = 40  # tokens of a chunk; the authors: 40
    overlap: NonNegativeInt = 5  # tokens on either side that it sees too; the authors: 5

    @classmethod
    def example(cls) -> TKL:
        return cls(4, 1)

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & Chunk(self.chunk, self.overlap, self.overlap)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.encoder()
    text = tokenizer("A long document is read chunk by chunk. " * 12, return_tensors="pt")
    with attach(model, TKL(16, 4)) as run:
        print(run.difference(**text), run.activity())
