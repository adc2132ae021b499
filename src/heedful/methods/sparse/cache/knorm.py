"""Keep the entries whose keys are short: the lowest |k|_2 of each head."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget
from heedful.kit.scored_cache import ScoredCache


class KNorm(ScoredCache):
    """Drops the entries with the longest keys; no query is asked."""

    paper = Paper(
        "2406.11430",
        "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
        "Alessio Devoto, Yu Zhao, Simone Scardapane, Pasquale Minervini",
        2024,
        "2406.11430",
        "EMNLP 2024",
        differs=(
            "Every layer is cut unless .on(layers=...) says otherwise; the authors' example spares the first two.",
            "The cache is cut after every call that outgrows its budget; the authors' code waits for 2048 tokens.",
            "A share is of the text so far; the authors' is of what the cache holds, anew at each cut.",
        ),
    )
    budget: Budget = 0.5  # share of the text, or entries a head; half costs the paper nothing on its tasks

    @at(Site.CACHE)
    def drop_long_keys(self, entries: CachedKV, call: Call) -> Tensor:
        return self.best(-entries.key.float().norm(dim=-1), entries, call)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, KNorm(0.5).on(layers=range(2, 30))) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
