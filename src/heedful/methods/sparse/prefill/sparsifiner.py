"""The keys of each query that softmax(A q (B k)ᵀ P) E ranks highest, P and E learned over places; exact among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import (
    Call,
    FieldError,
    FitContext,
    Fitted,
    Mask,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Site,
    SiteError,
    at,
    reads,
)
from heedful.kit.batches import at_least_one
from heedful.kit.budget import room_for
from heedful.kit.chosen import Chosen
from heedful.kit.running import wide
from heedful.kit.seeds import seed_of
from heedful.methods.sparse.prefill._pooled import sees_all

NAMES = ("query", "query_bias", "key", "key_bias", "down", "basis")


class Sparsifiner(Method):
    """Predicts a map of low rank from short queries and keys, and computes its highest pairs. Fit it first."""

    paper = Paper(
        "P115",
        "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        "Cong Wei, Brendan Duke, Ruowei Jiang, Parham Aarabi, Graham W. Taylor, Florian Shkurti",
        2023,
        "2303.13755",
        "CVPR 2023",
        differs=(
            "The predictor learns layer by layer from the model's own maps, the model as it is; the authors train both "
            "together for 5 epochs, on a teacher's maps, and then the model for 45 more with a teacher's answers.",
            "It keeps its rate, where the authors' rises and falls.",
            "Where a mask hides anything, as in causal models or of padding, plain attention stays.",
            "Tokens are not dropped, which the authors' code has as a further option.",
            "No time is saved in predicting: factors are held and multiplied as they are, not as sparse ones.",
        ),
    )
    subjects = ("image",)
    share: PositiveShare = 0.25  # of the keys that each query sees; the authors: 25 %
    tokens_by: PositiveInt = 6  # tokens to one of the predictor's; the authors: 6
    channels_by: PositiveInt = 2  # channels to one of the predictor's; the authors: 2
    terms: PositiveInt = 8  # of a row's terms those that count; the authors: 8
    least: NonNegativeFloat = 0.02  # entries of the basis that are smaller count for nothing; the authors: 0.02
    predictor: Fitted | None = None  # "query.LAYER" [c d], "key.LAYER" [c d], "down.LAYER" and "basis.LAYER" [n m], ...
    seed: int | None = None  # of where a fit begins, 0 unless given; without a fit: a predictor that learned nothing
    steps: PositiveInt = 500  # of a fit; the authors: 5 epochs of ImageNet
    rate: PositiveFloat = 3e-4  # AdamW's learning rate in a fit; the authors: 3e-4
    decay: NonNegativeFloat = 0.05  # AdamW's weight decay in a fit; the authors: 0.05

    @classmethod
    def neutral(cls) -> Sparsifiner:
        return cls(1.0)

    @classmethod
    def example(cls) -> Sparsifiner:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return self.share == 1 or not sees_all(call)

    @at(Site.MASK)
    @torch.no_grad()
    def narrow(self, mask: Mask, call: Call) -> Mask:
        query, key = _handed(call)
        p = self.parts(call.layer, query)
        terms, basis = coefficients(query, key, p), p["basis"].abs()
        terms = terms * (terms >= terms.topk(min(self.terms, terms.shape[-1])).values[..., -1:])
        basis = basis * (basis > self.least)
        many = room_for(self.share, len(basis))
        whole = call.marked_queries("cls") if "cls" in call.roles else call.q_pos < 0  # rows that see everything

        def pick(rows: slice) -> Tensor:
            best = (terms[:, :, rows] @ basis.mT).topk(many).indices
            seen = torch.zeros(*best.shape[:3], len(basis), dtype=torch.bool, device=best.device)
            return seen.scatter_(-1, best, True) | whole[..., rows, None]

        return mask & Chosen(pick)

    def parts(self, layer: int, query: Tensor) -> dict[str, Tensor]:
        """The layer's predictor, for queries `[b h n d]`."""
        if self.predictor is None:
            seed_of(self, "predictor")
            return {name: x.to(query) for name, x in self._start(layer, query).items()}
        found = {name: self.predictor.get(f"{name}.{layer}") for name in NAMES}
        wanted = {name: x.shape for name, x in self._start(layer, query).items()}
        if any(x is None or x.shape != wanted[name] for name, x in found.items()):
            n, d = query.shape[2:]
            rule = f"was fitted to another model, and layer {layer} has {n} tokens and heads of {d}"
            raise FieldError(self, "predictor", self.predictor, rule, "heedful.fit(Sparsifiner(), model, ...)")
        return {name: x.to(query) for name, x in found.items() if x is not None}

    def _start(self, layer: int, query: Tensor) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(4099 * (self.seed or 0) + layer)
        n, d = query.shape[2:]
        low, short = max(1, n // self.tokens_by), max(1, d // self.channels_by)

        def drawn(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(d)

        normal = (torch.nn.init.trunc_normal_(torch.empty(n, low), std=0.02, generator=random) for _ in range(2))
        maps = (drawn(short, d), drawn(short), drawn(short, d), drawn(short))
        return dict(zip(NAMES, (*maps, *normal), strict=True))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Sparsifiner:
        """Teach each layer's predictor the model's own map, by their squared differences."""
        reader = _Maps()
        with torch.no_grad(), context.attach(reader) as run:
            for inputs in at_least_one(self, batches, {"pixel_values": "..."}):
                run(**inputs)
        if not reader.seen:
            rule = "must be read by a layer whose tokens see all others, as those of an image"
            raise FieldError(self, "batches", "read by none", rule, [{"pixel_values": "..."}])
        found: dict[str, Tensor] = {}
        for layer, seen in reader.seen.items():
            found |= {f"{name}.{layer}": x for name, x in self._taught(layer, seen).items()}
        return replace(self, predictor=Fitted(found))

    def _taught(self, layer: int, seen: list[tuple[Tensor, Tensor, Tensor, float]]) -> dict[str, Tensor]:
        p = {name: x.to(seen[0][0]).requires_grad_() for name, x in self._start(layer, seen[0][0]).items()}
        optimiser = torch.optim.AdamW(p.values(), lr=self.rate, weight_decay=self.decay)
        for step in range(self.steps):
            query, key, rows, scale = seen[step % len(seen)]
            off = coefficients(query, key, p) @ p["basis"].mT - (scale * query @ key.mT).softmax(-1)
            (off.square() * rows).sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        return {name: x.detach() for name, x in p.items()}


def coefficients(query: Tensor, key: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """How much of each of the basis' rows a query's row of the map has, `[b h n m]`."""
    short = linear(key, p["key"], p["key_bias"]).mT @ p["down"]
    asked = linear(query, p["query"], p["query_bias"])
    return (asked @ short / math.sqrt(query.shape[1])).softmax(
        -1
    )  # by the number of heads, as the authors' code has it


def _handed(call: Call) -> tuple[Tensor, Tensor]:
    if call.query is None or call.key is None:
        raise SiteError(f"layer {call.layer}: queries and keys are known from MASK on")
    query, key = wide(call.query, call.spread(call.key))
    return query, key


class _Maps(Method):
    """Keeps the queries and keys of each layer, and which rows its predictor learns from."""

    seen: dict[int, list[tuple[Tensor, Tensor, Tensor, float]]] = field(default_factory=dict, repr=False, compare=False)

    def idle(self, call: Call) -> bool:
        return not sees_all(call)

    @reads(Site.MASK)
    def look(self, mask: Mask, call: Call) -> None:
        whole = call.marked_queries("cls") if "cls" in call.roles else call.q_pos < 0
        self.seen.setdefault(call.layer, []).append((*_handed(call), ~whole[..., None], call.scale))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    with attach(model, fit(Sparsifiner(steps=50), model, [inputs])) as run:
        print(run.difference(**inputs))
        print(run.activity())
