"""Each head's output block gets + lambda v k', k = W' v / |W' v|, where it writes along a steering vector v."""

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
from heedful.core.ranges import PositiveFloat, ShareBelowOne
from heedful.core.sites import Site
from heedful.kit.seeds import seed_of
from heedful.methods.intervene.language._contrast import TEXTS, class_means

PAPER = Paper(
    "P299",
    "Steer2Edit: From Activation Steering to Component-Level Editing",
    "Chung-En Sun, Ge Yan, Zimo Wang, Tsui-Wei Weng",
    2026,
    "2602.09870",
    differs=(
        "Only attention is edited; the authors also edit the neurons of the feed-forward blocks.",
        "Means run over all text tokens unless `response` marks some; the authors take those that predict a response.",
    ),
)


class Steer2Edit(Surgery):
    """Moves a steering vector into the weights of the heads that carry it. Fit it first.

    `fit` takes batches of the model's inputs with `positive` beside them, a bool for the batch or `[b]`, and, if only
    some tokens count, `response`, bool `[b n]`.
    """

    paper = PAPER
    rho: PositiveFloat = 0.18  # how many heads, fewer when higher; the authors' Llama-2-7B: 0.18
    alpha: ShareBelowOne = 0.8  # how sparse rather than small the edit is; the authors' Llama-2-7B: 0.8
    vectors: Fitted | None = None  # "v.LAYER" [e] the steering vector, "x.LAYER" [h d] the mean input of each head
    seed: int | None = None  # draw random vectors in place of fitted ones: the control that any steering needs

    @classmethod
    def neutral(cls) -> Steer2Edit:
        return cls(rho=4.0, alpha=0.5)  # no cosine is above rho * alpha

    @classmethod
    def example(cls) -> Steer2Edit:
        return cls(rho=0.05, alpha=0.5, seed=0)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Steer2Edit:
        means = class_means(self, context, (Site.HEAD_OUTPUT, Site.OUTPUT), batches)
        tensors = {f"x.{layer}": (other + trait) / 2 for layer, (other, trait) in means[Site.HEAD_OUTPUT].items()}
        tensors |= {f"v.{layer}": trait - other for layer, (other, trait) in means[Site.OUTPUT].items()}
        return replace(self, vectors=Fitted(tensors))

    def strengths(self, weights: HeadWeights, layer: int) -> Tensor:
        """lambda of each head, `[h]`: how much of the steering vector it takes in; 0 for heads left alone."""
        v, _, cosine = self._aligned(weights, layer)
        over = (cosine.abs() - self.rho * self.alpha).clamp(min=0) / (self.rho * (1 - self.alpha))
        return (cosine.sign() * over).to(v)

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if self.rho * self.alpha >= 1:
            return weights
        strengths = self.strengths(weights, layer.number)
        if not bool(strengths.any()):
            return weights
        v, k, _ = self._aligned(weights, layer.number)
        added = torch.einsum("h,e,hd->ehd", strengths, v, k)
        return replace(weights, o=(weights.o.to(added) + added).to(weights.o))

    def _aligned(self, weights: HeadWeights, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The unit steering vector `[e]`, each head's answer to it `[h d]`, how far the head writes along it `[h]`."""
        o = weights.o.double()
        if self.vectors is None:
            random = torch.Generator().manual_seed(1_000_003 * seed_of(self, "vectors", TEXTS) + layer)
            v, x = (torch.randn(size, generator=random).to(o) for size in (o.shape[:1], o.shape[1:]))
        else:
            v, x = (self.vectors.get(f"{letter}.{layer}", torch.empty(0)).to(o) for letter in "vx")
        if (*v.shape, *x.shape) != o.shape:
            rule = f"need [e] = {list(o.shape[:1])} and [h d] = {list(o.shape[1:])} in layer {layer}: fit to this model"
            raise FieldError(self, "vectors", self.vectors, rule, "heedful.fit(Steer2Edit(), model, batches)")
        v = torch.nn.functional.normalize(v, dim=0)
        k = torch.nn.functional.normalize(torch.einsum("ehd,e->hd", o, v), dim=-1)
        written = torch.einsum("ehd,hd->he", o, x)
        return v, k, torch.nn.functional.normalize(written, dim=-1) @ v


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    good, bad = (tokenizer(f"What a {word} day this is", return_tensors="pt") for word in ("lovely", "horrid"))
    edit = fit(Steer2Edit(), model, [{**good, "positive": True}, {**bad, "positive": False}])
    changed = sum(
        int((a != b).sum()) for a, b in zip(model.parameters(), operate(model, edit).parameters(), strict=True)
    )
    print(f"{changed} weights changed")
