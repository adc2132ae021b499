"""x + strength v at every token, v = mean of x over texts with a trait, less the mean over texts without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds import HeadWeights
from heedful.core.method import FitContext, Layer, Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean


class SteeringVector(Method):
    """Contrastive activation addition: pushes the residual stream along the difference that a trait makes.

    `fit` takes batches of the model's inputs with `positive` beside them, a bool for the batch or `[b]`, and looks at
    each text's last token. It finds a vector for each layer; `.on(layers=13)` adds one, which is what the paper does.
    """

    paper = Paper(
        "2312.06681",
        "Steering Llama 2 via Contrastive Activation Addition",
        "Nina Panickssery, Nick Gabrieli, Julian Schulz, Meg Tong, Evan Hubinger, Alexander Matt Turner",
        2023,
        "2312.06681",
        "ACL 2024",
        differs=(
            "The authors add the vector after the user's prompt only; here to every token, or with .when('decode') to "
            "generated ones.",
            "The authors' texts come in pairs that differ in their last token, a multiple-choice letter; here the two "
            "classes are averaged apart, which is the same for pairs.",
            "Vectors are not scaled to one norm across traits.",
        ),
    )
    strength: float = 1.0  # factor on the vector; the paper: -2 to 2, below 0 turns away from the trait
    vectors: Fitted | None = None  # "v.LAYER" [e], from a fit
    seed: int | None = None  # draw random vectors in place of fitted ones: the control that any steering needs

    def __post_init__(self) -> None:
        if not abs(self.strength) < float("inf"):
            raise FieldError(self, "strength", self.strength, "must be finite", 1.0)

    @classmethod
    def neutral(cls) -> SteeringVector:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> SteeringVector:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return self.strength == 0

    @at(Site.RESIDUAL)
    def steer(self, stream: Tensor, call: Call) -> Tensor:
        return stream + self.strength * self._vector(stream.shape[-1], call.layer).to(stream)

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return (
            weights
            if self.strength == 0
            else replace(weights, stream=self.strength * self._vector(layer.width, layer.number))
        )

    def _vector(self, width: int, layer: int) -> Tensor:
        if self.vectors is None:
            if self.seed is None:
                rule = "are not there yet: fit to texts with and without the trait, or give seed"
                raise FieldError(self, "vectors", None, rule, "heedful.fit(SteeringVector(), model, batches)")
            return torch.randn(width, generator=torch.Generator().manual_seed(1_000_003 * self.seed + layer))
        found = self.vectors.get(f"v.{layer}")
        if found is None or found.shape != (width,):
            rule = f"have no vector of width {width} for layer {layer}: fit to this model"
            raise FieldError(self, "vectors", self.vectors, rule, "heedful.fit(SteeringVector(), model, batches)")
        return found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SteeringVector:
        found: dict[int, Mean] = {}
        for batch in batches:
            inputs = dict(batch)
            if "positive" not in inputs:
                raise FieldError(self, "batches", sorted(inputs), "need 'positive' in each", {"positive": True})
            reader = _LastStates(Fitted({"positive": torch.as_tensor(inputs.pop("positive")).reshape(-1)}))
            with torch.no_grad(), context.attach(reader) as run:
                run(**inputs)
                for layer, mean in run[reader].items():
                    found[layer] = found[layer] + mean if layer in found else mean
        if not found or any(bool((mean.count == 0).any()) for mean in found.values()):
            raise FieldError(self, "batches", len(found), "must hold positive and other texts", {"positive": True})
        return replace(self, vectors=Fitted({f"v.{i}": mean.value[1] - mean.value[0] for i, mean in found.items()}))


class _LastStates(Method):
    """The mean of the residual stream at the last token, of texts without and with the trait, `[2 e]`."""

    of: Fitted  # "positive" [b] or [1], bool

    @reads(Site.RESIDUAL)
    def read(self, stream: Tensor, call: Call) -> Mean:
        b, _, e = stream.shape
        last = stream.double().gather(1, call.last[..., None].expand(b, 1, e))[:, 0]
        positive = self.of["positive"].to(last).expand(b)
        share = torch.stack([1 - positive, positive])
        return Mean.of(share @ last, share.sum(-1, keepdim=True))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    texts = {True: ("What a lovely", "How kind, a wonderful"), False: ("What a horrid", "How cruel, an awful")}
    batches = [{**tokenizer(x, return_tensors="pt"), "positive": flag} for flag, each in texts.items() for x in each]
    vector = fit(SteeringVector(), model, batches)
    asked = tokenizer("I think that the film was", return_tensors="pt")
    for strength in (-2.0, 0.0, 2.0):
        with attach(model, replace(vector, strength=strength).on(layers=15)) as run:
            print(strength, tokenizer.decode(run.generate(**asked, max_new_tokens=8, do_sample=False)[0]))
