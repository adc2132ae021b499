"""Keep the newest entries and, of the others, those that received most: the sum of all queries' weights so far."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.ranges import Share
from heedful.core.sites import Site, at
from heedful.core.summary import Summary, sums
from heedful.kit.budget import Budget, added_up, newest
from heedful.kit.scored_cache import ScoredCache


class HeavyHitter(ScoredCache):
    """H2O: half of the budget for the newest entries, half for the heavy hitters among the older ones."""

    paper = Paper(
        "2306.14048",
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        "Zhenyu Zhang, Ying Sheng, Tianyi Zhou, Tianlong Chen, Lianmin Zheng, Ruisi Cai, Zhao Song, Yuandong Tian, "
        "Christopher Ré, Clark Barrett, Zhangyang Wang, Beidi Chen",
        2023,
        "2306.14048",
        "NeurIPS 2023",
        differs=(
            "A group of query heads votes as one, by what all of them give; the authors' models have no groups.",
            "A call sees all that the cache held and the cut is for the next one, as in the authors' newer code; the "
            "paper cuts within the step.",
            "What the queries of tokens gave that are cropped later, as in assisted decoding, older entries keep.",
            "The share is of the text as it has grown, generated tokens included; the authors fix the number of "
            "entries at the prompt's length.",
        ),
    )
    budget: Budget = 0.2  # share of the text, or entries a head; the paper: 0.2
    recent: Share = 0.5  # share of the budget for the newest entries, 0 to 1; the paper: 0.5

    @sums("received")
    def weigh(self, pattern: Summary, call: Call) -> None:
        call.state.forward["received"] = pattern.received

    @at(Site.CACHE)
    def keep_heavy(self, entries: CachedKV, call: Call) -> Tensor:
        given = call.state.forward.pop("received").unflatten(1, (call.kv_heads, -1)).sum(2)
        total = added_up("received", given, entries, call)
        last = newest(entries, call, (self.recent * self.most(call)).floor())
        return self.best(total, entries, call, last)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, HeavyHitter(0.2)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
