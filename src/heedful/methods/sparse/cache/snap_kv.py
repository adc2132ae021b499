"""Keep the newest w entries and, of the others, those that the last w queries vote for: pool(sum of softmax)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.ranges import OddInt, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget
from heedful.methods.sparse.cache._voted import VOTES, VotedCache


class SnapKV(VotedCache):
    """The end of the text votes for what came before it; votes are pooled, so that neighbours stay together."""

    paper = Paper(
        "2404.14469",
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        "Yuhong Li, Yingbing Huang, Bowen Yang, Bharat Venkitesh, Acyr Locatelli, Hanchen Ye, Tianle Cai, "
        "Patrick Lewis, Deming Chen",
        2024,
        "2404.14469",
        "NeurIPS 2024",
        differs=(
            *VOTES,
            "A group of query heads votes as one; the authors' code keeps a cache for each query head.",
        ),
    )
    budget: Budget = 1024  # entries a head, the window included, or a share of the text; the paper: 1024 to 4096
    window: PositiveInt = 32  # last queries that vote, and entries that stay; the authors' code: 32, the paper 16 or 32
    kernel: OddInt = 5  # tokens that votes are pooled over, odd; the authors' code: 5, the paper 5 or 7
    pool: Literal["max", "mean"] = "max"  # "max" as in the paper, or "mean", the default of the authors' code

    @at(Site.CACHE)
    def snap(self, entries: CachedKV, call: Call) -> Tensor:
        last = self.last(entries, call)
        return self.best(self.pooled(entries, call, last), entries, call, last)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, SnapKV(64, window=16)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
