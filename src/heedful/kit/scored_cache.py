"""A cache that scores its entries and keeps each head's best: all of such a method but its score."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.method import Method
from heedful.kit.budget import Budget, all_fit, keep_best, room, room_for


class ScoredCache(Method, abstract=True):
    """Mark a function with `@at(Site.CACHE)`, score the entries `[b g k]` in it and return `self.best(score, ...)`."""

    chunk_invariant = False  # what is dropped after one call, the next cannot see
    budget: Budget = 0.5  # share of the text, or entries a head

    @classmethod
    def neutral(cls) -> Self:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(budget=0.25)

    def declares(self, tokens: int) -> dict[str, float]:
        return {"kept": min(tokens, room_for(self.budget, tokens))}

    def rests(self, tokens: int) -> str | None:
        return all_fit(room_for(self.budget, tokens), tokens, "budget=0.5")

    def most(self, call: Call) -> Tensor:
        """How many entries each head of each text may hold after this call, `[b|1 1 1]`."""
        return room(self.budget, call)

    def best(self, score: Tensor, entries: CachedKV, call: Call, stay: Tensor | None = None) -> Tensor:
        """Which entries stay: those that must, `[b|1 g|1 k]`, and the best of the others."""
        return keep_best(score if stay is None else score.masked_fill(stay, torch.inf), entries, self.most(call))
