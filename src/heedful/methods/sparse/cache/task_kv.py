"""Heads whose v = sum of c_i v_i lies far from the heads' mean keep all; the others sinks, recent and best entries."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, OddInt, PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, earlier, keep_best, length, newest
from heedful.kit.topk import top_k
from heedful.methods.sparse.cache._voted import VOTES, VotedCache


class TaskKV(VotedCache):
    """Heads that say something of their own keep everything; the rest of a layer's budget goes to the others."""

    paper = Paper(
        "P310",
        "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
        "Xingyang He, Jie Liu, Shaowei Chen",
        2025,
        "2501.15113",
        differs=(
            *VOTES,
            "A group of query heads is one head, with the mean of their weights; the paper says nothing of groups.",
            "Heads are told apart by the first call of a text, its prompt mostly, and stay so; budgets go on growing "
            "with the text, as the paper's formula has them.",
            "The number of far heads is rounded to the nearest, and the head nearest to the centre comes on top of it; "
            "the others share what both leave, so that the budget holds, where the paper's formula leaves it out.",
            "Where the whole heads leave less, the others still hold their sinks and recent tokens, as in the paper, "
            "and the layer more than its budget.",
            "Votes are pooled among the tokens before the recent ones.",
        ),
    )
    budget: Budget = 0.4  # entries of the average head, or a share of the text; the paper: 0.4 and 0.6
    window: PositiveInt = 32  # last queries that vote; the paper: 32
    kernel: OddInt = 7  # tokens that votes are pooled over, odd; the paper: 7
    pool: Literal["max", "mean"] = "mean"  # "max" or "mean", as in the paper
    sinks: NonNegativeInt = 16  # first entries that every head keeps; the paper: 16
    recent: PositiveInt = 256  # newest entries that every head keeps; the paper: 256
    top: PositiveInt = 256  # entries of the highest votes that say what a head's output is about; the paper: 256
    share: Share = 0.25  # of the first layer's key heads that are far; the paper: 0.25 (MHA) and 0.3 (GQA)
    # far heads in the last layer, between which and the first it falls evenly; the paper: 4 and 1
    deepest: NonNegativeInt = 4
    nearest: NonNegativeInt = 1  # heads nearest to the centre that keep everything too; the paper: 1

    @classmethod
    def example(cls) -> TaskKV:
        return cls(0.6, 2, 3, sinks=1, recent=2, top=4, share=0.5, deepest=1, nearest=0)

    def declares(self, tokens: int) -> dict[str, float]:
        return {}  # whole heads hold another number than the others

    def last(self, entries: CachedKV, call: Call) -> Tensor:
        return newest(entries, call, self.recent)

    @at(Site.CACHE)
    def allot(self, entries: CachedKV, call: Call) -> Tensor:
        votes, g, tokens = self.votes(entries, call), call.kv_heads, length(call)
        whole = self.whole(votes, entries, call)[..., None]
        others = (~whole).sum(1, keepdim=True)
        left = (g * self.most(call) - (g - others) * tokens) // others.clamp(min=1)
        room = torch.where(whole, tokens, left.clamp(min=self.sinks + self.recent))
        last = self.last(entries, call)
        stay = last | (entries.positions.position < self.sinks)
        score = self.among(votes, entries, last).masked_fill(stay, torch.inf)
        return keep_best(score, entries, room)

    def whole(self, votes: Tensor, entries: CachedKV, call: Call) -> Tensor:
        """Which key heads keep everything, `[b g]`; texts that were told apart before stay as they are."""
        old, begun = call.state.cache.get("whole"), earlier(call)[:, 0] > 0
        if old is None or not bool(begun.all()):
            new = self.apart(votes, entries, call)
            call.state.cache["whole"] = new if old is None else torch.where(begun, old, new)
        return call.state.cache["whole"]

    def apart(self, votes: Tensor, entries: CachedKV, call: Call) -> Tensor:
        """The heads farthest from the mean of all, and those nearest to it, `[b g]`."""
        said = votes * top_k(votes, self.top, entries.is_text)  # sums order heads as means do
        about = (said[:, :, None] @ entries.value.float())[:, :, 0]
        # g times the way from the mean: of two heads, which are equally far, by the same number
        distance = (about[:, :, None] - about[:, None]).sum(2).norm(dim=-1)
        rank = distance.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        far = min(self.far_heads(call), call.kv_heads)
        return (rank < far) | (rank >= max(far, call.kv_heads - self.nearest))

    def far_heads(self, call: Call) -> int:
        """How many key heads of the layer are far ones."""
        first = call.kv_heads * self.share
        place, steps = call.listed.index(call.layer), len(call.listed) - 1
        return round(first - (first - self.deepest) * place / max(steps, 1))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    method = TaskKV(0.5, sinks=4, recent=16, share=1 / 3, deepest=1, nearest=0)
    with attach(model, method) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
