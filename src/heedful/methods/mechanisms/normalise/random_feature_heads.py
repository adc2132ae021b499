"""Out_i = 1/N sum_j relu(q_i' W_h k_j) v_j with W_h drawn once for each head and never learned."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Generator, Tensor

from heedful.authoring import Call, Method, NonNegativeInt, Paper, Site, Weighing, at, weighs


class RandomFeatureHeads(Method):
    """Heads look where chance lets them, so that what is learned of them is linear. For theory and many heads.

    Freeze the projections to queries and keys, and what is left is a convex problem.
    """

    paper = Paper(
        "P010",
        "What can a Single Attention Layer Learn? A Study Through the Random Features Lens",
        "Hengyu Fu, Tianyu Guo, Yu Bai, Song Mei",
        2023,
        "2307.11353",
        "NeurIPS 2023",
        differs=(
            "Abstracts and summaries of the paper were at hand: here entries of the matrices have a variance of 1 over "
            "the head's width, so that scores are as large as without them; the authors choose variances of their own.",
            "The model's projections and its scale come before, so that a layer of any width can have it; the paper's "
            "queries and keys are the inputs themselves.",
            "N is the number of keys that a query sees.",
        ),
    )
    mean: float = 0.0  # multiple of the identity that is added to every matrix: above 0, like tends to meet like
    seed: NonNegativeInt = 0  # of the draw; every layer and head has a matrix of its own

    @classmethod
    def example(cls) -> RandomFeatureHeads:
        return cls(mean=1.0)

    @at(Site.QUERY)
    def turn(self, query: Tensor, call: Call) -> Tensor:
        matrices = drawn(self.seed, call.layer, call.heads, query.shape[-1]).to(query)
        return query @ matrices + self.mean * query

    @weighs
    def rectify(self, call: Call) -> Weighing:
        return Weighing("relu", mean=True)


@lru_cache(maxsize=256)
def drawn(seed: int, layer: int, heads: int, width: int) -> Tensor:
    """A layer's matrices `[h d d]`."""
    random = Generator().manual_seed(100_003 * seed + layer)
    return torch.randn(heads, width, width, generator=random) / width**0.5


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, RandomFeatureHeads()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
