"""x + strength v at every token, v = mean of x over texts with a trait, less the mean over texts without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.methods.intervene.language._contrast import AddsVector, contrast


class SteeringVector(AddsVector):
    """Contrastive activation addition: pushes the residual stream along the difference that a trait makes.

    `fit` takes batches of the model's inputs with `positive` beside them, a bool for the batch or `[b]`, and looks at
    each text's last token. It finds a vector for each layer; `.on(layers=13)` adds one, which is what the paper does.
    Its strengths are -2 to 2.
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

    @at(Site.RESIDUAL)
    def steer(self, stream: Tensor, call: Call) -> Tensor:
        return stream + self.added(call.layer, stream.shape[-1]).to(stream)

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        return weights if self.strength == 0 else replace(weights, stream=self.added(layer.number, layer.width))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SteeringVector:
        found = contrast(self, context, Site.RESIDUAL, batches)
        return replace(self, vectors=Fitted({f"v.{layer}": one.difference for layer, one in found.items()}))


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
