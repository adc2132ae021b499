"""SnapKV's votes with more room in early layers: b_l falls evenly from 2b - b/beta to b/beta, b on average."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.ranges import OddInt, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, length, room_for
from heedful.methods.sparse.cache._voted import VOTES, VotedCache


class PyramidKV(VotedCache):
    """Early layers spread their weight and keep much, late ones look at few entries; the sum is an even budget's."""

    paper = Paper(
        "2406.02069",
        "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
        "Zefan Cai, Yichi Zhang, Bofei Gao, Yuliang Liu, Yucheng Li, Tianyu Liu, Keming Lu, Wayne Xiong, Yue Dong, "
        "Junjie Hu, Wen Xiao",
        2024,
        "2406.02069",
        differs=(
            *VOTES,
            "A group of query heads votes as one; the authors' code keeps a cache for each query head.",
            "Each layer's room is rounded down, so that all together never hold more than an even budget; the authors' "
            "code rounds the step from layer to layer down, by which late layers hold more.",
            "Where the first layer has room for the whole text its surplus goes to the last ones, as in the authors' "
            "code; for texts shorter than twice the budget that code has even budgets, here they stay uneven.",
            "As long as the first layer has room for the whole text, its room grows with the text and the last one's "
            "shrinks; the authors set all rooms once, by the prompt.",
        ),
    )
    budget: Budget = 128  # entries a head of the average layer, the window included, or a share; the authors: 128
    window: PositiveInt = 8  # last queries that vote, and entries that stay in every layer; the authors' runs: 8
    kernel: OddInt = 7  # tokens that votes are pooled over, odd; the authors' runs: 7
    # the last layer has a beta-th of an even budget before the window; the paper: 20; 1 is SnapKV
    beta: PositiveInt = 20

    def declares(self, tokens: int) -> dict[str, float]:
        return {}  # each layer keeps another number

    def most(self, call: Call) -> Tensor:
        tokens = length(call)
        rooms = [self.room_in(call.listed.index(call.layer), len(call.listed), n) for n in tokens.flatten().tolist()]
        return tokens.new_tensor(rooms).view_as(tokens)

    def room_in(self, layer: int, depth: int, tokens: int) -> int:
        """How many entries a head of one of `depth` layers may hold of so many tokens."""
        even = min(tokens, room_for(self.budget, tokens))
        window = min(self.window, even)
        average = even - window
        first = min(2 * average - average // self.beta, tokens - window)
        fall = 2 * (first - average)  # from the first layer to the last
        return window + (first - -(-layer * fall // (depth - 1)) if depth > 1 else average)

    @at(Site.CACHE)
    def snap(self, entries: CachedKV, call: Call) -> Tensor:
        last = self.last(entries, call)
        return self.best(self.pooled(entries, call, last), entries, call, last)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, PyramidKV(64)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
