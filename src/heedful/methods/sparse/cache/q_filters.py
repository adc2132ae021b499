"""Keep the keys with the largest <k, u>: u is the principal direction of a head's queries, averaged over its group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.entry import FitContext
from heedful.core.fitted import Fitted
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum
from heedful.kit.batches import at_least_one, read
from heedful.kit.budget import Budget, newest
from heedful.kit.scored_cache import ScoredCache
from heedful.methods.sparse.cache._fits import Moments, of_layer


class QFilters(ScoredCache):
    """Keeps the newest entries and, of the others, those whose keys lie furthest along where queries point.

    Fit it first: `fit` takes batches of the model's inputs. Rotary embedding is part of queries and keys.
    """

    paper = Paper(
        "P134",
        "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression",
        "Nathan Godey, Alessio Devoto, Yu Zhao, Simone Scardapane, Pasquale Minervini, Éric de la Clergerie, "
        "Benoît Sagot",
        2025,
        "2503.02812",
        differs=(
            "The direction is drawn from all queries of the batches, by their second moments; the authors' code "
            "takes the singular vectors of 3000 sampled ones, which is the same direction but for the sampling.",
            "It points to where the mean query lies, as in the paper; the authors' code lets the queries vote by sign.",
            "A call sees all that the cache held and the cut is for the next one; the authors' code cuts before the "
            "attention of the call that overflows the cache.",
        ),
    )
    budget: Budget = 128  # entries a head, the newest included; the authors' demo: 128
    window: NonNegativeInt = 64  # newest entries that always stay; the authors' demo: 64
    filters: Fitted | None = None  # "filters.LAYER" [g d]
    seed: int | None = None  # without a fit: random directions, the control

    @classmethod
    def neutral(cls) -> QFilters:
        return cls(budget=1.0, seed=0)

    @classmethod
    def example(cls) -> QFilters:
        return cls(budget=6, window=2, seed=0)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> QFilters:
        """Find each head's filter from the queries of a few texts."""
        moments = read(context, _Queries(), at_least_one(self, batches))
        found = {}
        for size in context.layers:
            moment = moments[size.number]
            main = torch.linalg.eigh(moment[..., :-1, :-1]).eigenvectors[..., -1]  # [h d]
            main = main * (main * moment[..., :-1, -1]).sum(-1, keepdim=True).sign()
            found[f"filters.{size.number}"] = main.unflatten(0, (size.kv_heads, -1)).mean(1).float()
        return replace(self, filters=Fitted(found))

    @at(Site.CACHE)
    def filter(self, entries: CachedKV, call: Call) -> Tensor:
        _, g, _, d = entries.key.shape
        direction = of_layer(self, "filters", (g, d), call).to(entries.key.device)
        score = torch.einsum("bgkd,gd->bgk", entries.key.float(), direction)
        return self.best(score, entries, call, newest(entries, call, self.most(call).clamp(max=self.window)))


class _Queries(Moments):
    @reads(Site.QUERY)
    def read(self, query: Tensor, call: Call) -> Sum:
        return self.products(query, call.is_text)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    calm = tokenizer("The sea is calm. Rain falls on the hills. " * 20, return_tensors="pt")
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, fit(QFilters(48, 16), model, [calm])) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
