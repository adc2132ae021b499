"""w_j^2 / sum of w_i^2 over the weights of its layer that are no smaller: in each module the lowest go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.paper import Paper
from heedful.core.ranges import ShareBelowOne

MODULES = ("qkv", "o")  # what goes into a head's attention, and what comes out: each is ranked over all layers


class DIMAP(Surgery):
    """Sets single weights of attention's projections to zero, without any data; the copy is as large as before.

    `fit` reads the weights alone, `fit(DIMAP(), model, ())`, and keeps up to which score a module's weights go.
    """

    paper = Paper(
        "P026",
        "Data-independent Module-aware Pruning for Hierarchical Vision Transformers",
        "Yang He, Joey Tianyi Zhou",
        2024,
        "2404.13648",
        "ICLR 2024",
        differs=(
            "The two modules of attention; the paper's third, of the feed-forward part, is not here.",
            "Any model with attention; the paper's are Swin Transformers.",
            "The same share of each module goes; the paper gives each module's cut, and not how it is chosen.",
            "In one shot; the paper trains for 30 epochs afterwards.",
        ),
    )
    share: ShareBelowOne = 0.5  # of each module's weights to set to zero; the paper: up to half of a model's
    cuts: Fitted | None = None  # "qkv" and "o" []: the score up to which a module's weights go

    @classmethod
    def neutral(cls) -> DIMAP:
        return cls(0.0)

    @classmethod
    def example(cls) -> DIMAP:
        return cls(cuts=Fitted({name: torch.tensor(1e-3, dtype=torch.float64) for name in MODULES}))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> DIMAP:
        layers = [context.weights(layer.number) for layer in context.layers]
        cuts = {}
        for name in MODULES:
            scores = torch.cat([self.scores(_flat(weights, name)) for weights in layers]).sort().values
            gone = round(self.share * len(scores))
            cuts[name] = scores[gone - 1] if gone else scores.new_tensor(-1.0)
        return replace(self, cuts=Fitted(cuts))

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if not self.share:
            return weights
        if self.cuts is None:
            raise FieldError(self, "cuts", None, "are not known yet: fit", "heedful.fit(DIMAP(), model, ())")
        pruned: dict[str, Tensor] = {}
        for name in MODULES:
            flat = _flat(weights, name)
            kept = flat.masked_fill(self.scores(flat) <= self.cuts[name].to(flat.device), 0)
            parts = kept.split([getattr(weights, letter).numel() for letter in name])
            pruned |= {x: part.view_as(getattr(weights, x)) for x, part in zip(name, parts, strict=True)}
        return replace(weights, **pruned)

    def scores(self, flat: Tensor) -> Tensor:
        """Of a layer's weights `[n]`, from 0 to 1: how much of what is left each one is when its turn to go comes."""
        squares, order = flat.double().square().sort(descending=True, stable=True)
        return torch.empty_like(squares).index_copy(0, order, squares / squares.cumsum(0).clamp(min=1e-300))


def _flat(weights: HeadWeights, name: str) -> Tensor:
    """All weights of the projections that a module has in one layer."""
    return torch.cat([getattr(weights, letter).reshape(-1) for letter in name])


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    for share in (0.0, 0.2, 0.4):
        print(share, operate(model, fit(DIMAP(share), model, ()))(**text, labels=text["input_ids"]).loss.item())
