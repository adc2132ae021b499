"""Each query sees the k keys of highest <P_r^T q, P_r^T k>, P_r being the first principal axes of the head's keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.fitted import Fitted
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum
from heedful.kit.batches import at_least_one, read
from heedful.kit.budget import Budget, all_fit, is_whole, room_for, rooms
from heedful.kit.chosen import Chosen
from heedful.methods.sparse.cache._fits import Moments, of_layer


class Loki(Method):
    """Ranks cached keys in a few dimensions and attends to the best with all of them; the cache keeps every entry.

    Fit it first: `fit` takes batches of the model's inputs. Rotary embedding is part of queries and keys.
    """

    paper = Paper(
        "P170",
        "Loki: Low-Rank Keys for Efficient Sparse Attention",
        "Prajwal Singhania, Siddharth Singh, Shwai He, Soheil Feizi, Abhinav Bhatele",
        2024,
        "2406.02542",
        "NeurIPS 2024",
        differs=(
            "A share is that of the text up to the query, rounded up; the authors take that of all keys in the call, "
            "rounded down, so that the first queries of a prompt see everything.",
            "The rank is a share of a head's dimensions, as in the paper; their code reads a fraction as one of the "
            "keys' variance.",
            "Axes are those of keys after rotary embedding; the authors also try keys before it, and choose by model.",
            "Cached keys stay in the model's own axes: the authors turn them once, here their first axes are "
            "computed anew at each step.",
            "What a model adds to its scores does not count in the ranking.",
        ),
    )
    budget: Budget = 0.25  # keys that a query sees; the paper: a quarter
    rank: PositiveShare = 0.25  # share of a head's dimensions that the ranking uses; the paper: a quarter
    axes: Fitted | None = None  # "axes.LAYER" [g d d], a column for each axis, the widest first
    seed: int | None = None  # without a fit: random axes, the control

    @classmethod
    def neutral(cls) -> Loki:
        return cls(budget=1.0, seed=0)

    @classmethod
    def example(cls) -> Loki:
        return cls(budget=3, rank=0.5, seed=0)

    def declares(self, tokens: int) -> dict[str, float]:
        return {"density": sum(min(n, room_for(self.budget, n)) for n in range(1, tokens + 1)) / tokens**2}

    def rests(self, tokens: int) -> str | None:
        return all_fit(room_for(self.budget, tokens), tokens, "budget=0.5")

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Loki:
        """Find the principal axes of each key head from the keys of a few texts."""
        moments = read(context, _Keys(), at_least_one(self, batches))
        found = {}
        for layer, moment in moments.items():
            mean = moment[..., :-1, -1:] / moment[..., -1:, -1:]
            spread = moment[..., :-1, :-1] / moment[..., -1:, -1:] - mean @ mean.mT
            found[f"axes.{layer}"] = torch.linalg.eigh(spread).eigenvectors.flip(-1).float()
        return replace(self, axes=Fitted(found))

    def idle(self, call: Call) -> bool:
        return call.cross or is_whole(self.budget)

    @at(Site.MASK)
    def rank_keys(self, mask: Mask, call: Call) -> Mask:
        if call.query is None or call.key is None:
            return mask
        key = call.key.detach()
        key = key.to(torch.promote_types(key.dtype, torch.float32))
        b, g, total, d = key.shape
        axes = of_layer(self, "axes", (g, d, d), call).to(key)
        if self.axes is None:
            axes = torch.linalg.qr(axes).Q
        axes = axes[..., : room_for(float(self.rank), d)]
        low = key @ axes  # [b g k r]
        query = call.query.detach().to(key).unflatten(1, (g, -1)) @ axes[:, None]  # [b g h/g q r]
        positions = call.places

        def best(rows: slice) -> Tensor:
            part = positions.tile(rows, slice(0, total))
            keep = mask.keeps(part.pairs)
            scores = (query[:, :, :, rows].flatten(2, 3) @ low.mT).view(b, positions.heads, -1, total)
            scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
            most = rooms(self.budget, (part.q_pos + 1).clamp(min=1))[..., None]  # [b|1 1 r 1]
            found = scores.topk(min(int(most.max()), total)).indices
            counted = (torch.arange(found.shape[-1], device=found.device) < most).expand(found.shape)
            return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, found, counted)

        return mask & Chosen(best)


class _Keys(Moments):
    @reads(Site.KEY)
    def read(self, key: Tensor, call: Call) -> Sum:
        return self.products(key, call.k_pos[:, :1] >= 0 if call.cross else call.is_text)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    calm = tokenizer("The sea is calm. Rain falls on the hills. " * 20, return_tensors="pt")
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, fit(Loki(), model, [calm])) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
