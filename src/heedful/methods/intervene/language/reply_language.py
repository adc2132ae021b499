"""o + strength v at every token, o what attention gives, v = mean of o over texts in a language, less over others."""

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
from heedful.methods.intervene.language._contrast import AddsVector, class_means


class ReplyLanguage(AddsVector):
    """Moves what attention blocks give towards the mean of a language, so that a model replies in that language.

    `fit` takes batches of the model's inputs with `positive` beside them, a bool for the batch or `[b]`: True for texts
    in the language of the query, False for texts in the one that the model falls back to, and, if only some tokens
    count, `response`, bool `[b n]`. The paper acts in middle layers: `.on(layers=range(10, 20))` of 30.
    """

    paper = Paper(
        "P253",
        "Why do LLaVA Vision-Language Models Reply to Images in English?",
        "Musashi Hinck, Carolin Holtermann, Matthew Lyle Olson, Florian Schneider, Sungduk Yu, Anahita Bhiwandiwalla, "
        "Anne Lauscher, Shao-Yen Tseng, Vasudev Lal",
        2024,
        "2407.02333",
        "EMNLP 2024 Findings",
        differs=(
            "The authors' full text and code were not at hand: this follows the abstract and summaries, by which the "
            "outputs of middle attention layers are moved towards the mean of the query's language.",
            "That the move is the language's mean less that of the other texts, of all of a text's tokens, at every "
            "token and by its whole length, is ours.",
            "The paper mainly compares how models are made and what they represent; the intervention alone is here.",
        ),
    )

    @at(Site.OUTPUT)
    def move(self, output: Tensor, call: Call) -> Tensor:
        return output + self.added(call.layer, output.shape[-1]).to(output)

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if self.strength == 0:
            return weights
        added = self.added(layer.number, layer.width)
        return replace(weights, o_bias=added if weights.o_bias is None else weights.o_bias + added.to(weights.o_bias))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> ReplyLanguage:
        means = class_means(self, context, (Site.OUTPUT,), batches)[Site.OUTPUT]
        return replace(self, vectors=Fitted({f"v.{layer}": mine - other for layer, (other, mine) in means.items()}))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    texts = {True: ("Le chat dort.", "Il fait beau dehors."), False: ("The cat sleeps.", "The weather is fine.")}
    batches = [{**tokenizer(x, return_tensors="pt"), "positive": flag} for flag, each in texts.items() for x in each]
    method = fit(ReplyLanguage(), model, batches)
    asked = tokenizer("Once upon a time", return_tensors="pt")
    for strength in (-1.0, 0.5, 1.0):
        with attach(model, replace(method, strength=strength).on(layers=range(10, 20))) as run:
            print(strength, tokenizer.decode(run.generate(**asked, max_new_tokens=12, do_sample=False)[0]))
