"""What methods share that rank heads and take the least important out of the weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch

from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.ranges import Share
from heedful.kit.head_search import Head


class HeadPruner(Surgery, abstract=True):
    """Takes groups of heads out; with a key head each, a group is a head. `fit` finds how important each is."""

    share: Share = 0.2  # share of groups to drop, least important first
    groups: tuple[Head, ...] = ()  # (layer, key head) pairs to drop instead of a share
    # where the share is taken from, and what becomes of it: "even", "uneven" or "zeros"
    form: Literal["even", "uneven", "zeros"] = "even"
    importance: Fitted | None = None  # "LAYER" [g]

    @classmethod
    def neutral(cls) -> Self:
        return cls(share=0.0)

    @classmethod
    def example(cls) -> Self:
        return cls(groups=((0, 0),))

    def dropped(self) -> tuple[tuple[int, int], ...]:
        """The (layer, key head) pairs that go, of a layer's the least important first."""
        if self.groups or not self.share:
            return tuple(sorted(set(self.groups)))
        if self.importance is None:
            good = f"heedful.fit({type(self).__name__}(), model, batches)"
            raise FieldError(self, "importance", None, "is not known yet: fit, or name `groups`", good)
        by_layer = {int(name): x.tolist() for name, x in self.importance.items()}
        order = sorted((value, layer, group) for layer, x in by_layer.items() for group, value in enumerate(x))
        if self.form == "even":
            count = {layer: min(round(self.share * len(x)), len(x) - 1) for layer, x in by_layer.items()}
            if not any(count.values()):
                rule = f"drops none of a layer's {max(map(len, by_layer.values()))} groups, of which one always stays"
                raise FieldError(self, "share", self.share, f"{rule}; take more, or form='uneven'", 0.5)
            mine = {layer: [group for _, i, group in order if i == layer] for layer in by_layer}
            return tuple((layer, group) for layer, x in mine.items() for group in x[: count[layer]])
        best = {(layer, x.index(max(x))) for layer, x in by_layer.items()}
        free = [(layer, group) for _, layer, group in order if (layer, group) not in best]
        return tuple(free[: round(self.share * len(order))])

    def require_depth(self, depth: int) -> None:
        for name, layers in (
            ("groups", [layer for layer, _ in self.groups]),
            ("importance", list(map(int, self.importance or ()))),
        ):
            if max(layers, default=0) >= depth:
                good = (
                    ((depth - 1, 0),) if name == "groups" else f"heedful.fit({type(self).__name__}(), model, batches)"
                )
                raise FieldError(self, name, getattr(self, name), f"must be of the model's {depth} layers", good)

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        gone = {group for number, group in self.dropped() if number == layer.number}
        if not gone:
            return weights
        if max(gone) >= layer.kv_heads:
            rule = f"name key head {max(gone)} of layer {layer.number}, which has {layer.kv_heads}; fit to this model"
            raise FieldError(self, "groups", sorted(gone), rule, ((layer.number, 0),))
        kept = tuple(group for group in range(layer.kv_heads) if group not in gone)
        if not kept:
            raise FieldError(self, "groups", sorted(gone), f"leave layer {layer.number} no head", ((layer.number, 0),))
        if self.form != "zeros":
            return weights.keep_groups(kept)
        silent = torch.tensor(sorted(gone)).to(weights.o.device)
        # by groups, o is [e g h/g d]: heads that share a key head stand together
        o = weights.o.unflatten(1, (layer.kv_heads, -1)).index_fill(1, silent, 0.0)
        return replace(weights, o=o.flatten(1, 2))
