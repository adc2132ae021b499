"""SnapKV's votes compared across heads: b + (1 - f)(c_i - b) entries for the head that has c_i of a layer's best."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.ranges import OddInt, PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, keep_best
from heedful.kit.topk import top_k
from heedful.methods.sparse.cache._voted import VOTES, UnevenCache


class AdaKV(UnevenCache):
    """Heads with scattered votes keep more, heads with few high ones less; a safeguard leaves each its floor."""

    paper = Paper(
        "2407.11550",
        "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
        "Yuan Feng, Junlin Lv, Yukun Cao, Xike Xie, S. Kevin Zhou",
        2024,
        "2407.11550",
        "NeurIPS 2025",
        differs=(
            *VOTES,
            "Heads share their room anew after each call, among what they still hold; the authors share it once.",
            "A head's room is rounded down, so that all together never hold more than an even budget; the authors' "
            "code rounds the floor down and the sum to the nearest.",
            "This is the authors' form for grouped queries, where the heads of a group vote together by their mean, "
            "and on top of SnapKV; their form on top of PyramidKV is not here.",
        ),
    )
    budget: Budget = 1024  # entries of the average head, the window included, or a share; the paper: 128 to 1024
    window: PositiveInt = 32  # last queries that vote, and entries that stay in every head; the authors' code: 32
    kernel: OddInt = 7  # tokens that votes are pooled over, odd; the authors' code: 7
    floor: Share = 0.2  # share of an even budget before the window that no head goes below; the authors' runs: 0.2

    @at(Site.CACHE)
    def allot(self, entries: CachedKV, call: Call) -> Tensor:
        last, most = self.last(entries, call), self.most(call)
        votes = self.pooled(entries, call, last)
        window = most.clamp(max=self.window)
        even = most - window
        before = (entries.is_text & ~last).flatten(1)
        best = top_k(votes.flatten(1), (votes.shape[1] * even).flatten(1), before).view_as(votes)
        spare = (1 - self.floor) * (best.sum(-1, keepdim=True) - even).double()  # float32 rounds shares otherwise
        return keep_best(votes.masked_fill(last, float("inf")), entries, window + (even + spare).floor())


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, AdaKV(64, window=16)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
