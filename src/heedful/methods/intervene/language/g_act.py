"""x + strength d_c at every token, c = argmax of a layer's probe of x; d are the centres of what a trait changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.seeds import seed_of
from heedful.methods.intervene.language._contrast import TEXTS, contrast

ROUNDS = 100  # of the search for centres, which ends by itself long before


class GACT(Method):
    """Steers along one of a few directions, which a small probe in each layer chooses for every token.

    `fit` takes batches of the model's inputs with `positive` beside them, a bool for the batch or `[b]`, and looks at
    each text's last token; the first text with the trait is paired with the first without, and so on. What a trait
    changes in these pairs falls into `clusters`, whose centres are the directions; the probe learns from the texts
    without the trait which cluster they belong to.
    """

    paper = Paper(
        "P306",
        "Steering Conceptual Bias via Transformer Latent-Subspace Activation",
        "Vansh Sharma, Venkat Raman",
        2025,
        "2506.18887",
        differs=(
            "The authors' full text was not at hand: this follows its abstract and summaries. Centres are those of "
            "k-means, probes are softmax regressions.",
            "The authors go on refining probes while the model writes; here they are done with the fit.",
            "Their other way, single weights of feed-forward parts, is not here.",
        ),
    )
    strength: float = 1.0  # factor on the direction, below 0 turns away from the trait
    clusters: PositiveInt = 2  # directions of each layer
    steps: PositiveInt = 200  # of gradient descent that a probe learns in
    rate: PositiveFloat = 1.0  # of these steps, on states of mean 0 and length 1
    found: Fitted | None = None  # "d.LAYER" [c e], "w.LAYER" [c e], "b.LAYER" [c], from a fit
    seed: int | None = None  # draw random directions and probes in place of fitted ones: the control

    @classmethod
    def neutral(cls) -> GACT:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> GACT:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return self.strength == 0

    @at(Site.RESIDUAL)
    def steer(self, stream: Tensor, call: Call) -> Tensor:
        directions, weight, bias = (x.to(stream) for x in self._of(stream.shape[-1], call.layer))
        choice = (stream @ weight.mT + bias).argmax(-1)
        return stream + self.strength * directions[choice]

    def _of(self, width: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's directions and its probe."""
        if self.found is None:
            draw = torch.Generator().manual_seed(1_000_003 * seed_of(self, "found", TEXTS) + layer)
            directions, weight = torch.randn(2, self.clusters, width, generator=draw)
            return directions, weight, torch.zeros(self.clusters)
        held = [self.found.get(f"{name}.{layer}") for name in "dwb"]
        if any(x is None for x in held) or held[0].shape[1:] != (width,):  # type: ignore[union-attr]
            rule = f"have no directions of width {width} for layer {layer}: fit to this model"
            raise FieldError(self, "found", self.found, rule, "heedful.fit(GACT(), model, batches)")
        return held[0], held[1], held[2]  # type: ignore[return-value]

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> GACT:
        found = contrast(self, context, Site.RESIDUAL, batches, paired=True)
        count = len(next(iter(found.values())).trait)
        if count < self.clusters:
            rule = f"must be at most the {count} pairs of texts"
            raise FieldError(self, "clusters", self.clusters, rule, count)
        tensors: dict[str, Tensor] = {}
        for layer, one in found.items():
            centres, member = centred(one.trait - one.other, self.clusters)
            weight, bias = self._probe(one.other, member)
            tensors |= {f"d.{layer}": centres.float(), f"w.{layer}": weight.float(), f"b.{layer}": bias.float()}
        return replace(self, found=Fitted(tensors))

    def _probe(self, states: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """A softmax regression from states `[n e]` to clusters `[n]`, as maps of the states as they come."""
        mean = states.mean(0)
        size = (states - mean).norm(dim=-1).mean().clamp(min=1e-12)
        x, wanted = (states - mean) / size, one_hot(member, self.clusters).to(states.dtype)
        weight, bias = states.new_zeros(self.clusters, states.shape[1]), states.new_zeros(self.clusters)
        for _ in range(self.steps):
            off = ((x @ weight.mT + bias).softmax(-1) - wanted) / len(x)
            weight, bias = weight - self.rate * off.mT @ x, bias - self.rate * off.sum(0)
        return weight / size, bias - weight @ mean / size


def centred(x: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """k-means of rows `[n e]`: centres `[c e]` and which each row belongs to `[n]`.

    It begins with the row that is nearest to the mean, and those that are furthest from what is there.
    """
    begun = [int((x - x.mean(0)).norm(dim=-1).argmin())]
    for _ in range(clusters - 1):
        begun.append(int(torch.cdist(x, x[begun]).amin(1).argmax()))
    centres = x[begun]
    member = torch.cdist(x, centres).argmin(1)
    for _ in range(ROUNDS):
        sums = one_hot(member, clusters).to(x.dtype).mT
        count = sums.sum(1, keepdim=True)
        centres = torch.where(count > 0, sums @ x / count.clamp(min=1), centres)
        again = torch.cdist(x, centres).argmin(1)
        if torch.equal(again, member):
            break
        member = again
    return centres, member


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    texts = {True: ("What a lovely", "How kind, a wonderful"), False: ("What a horrid", "How cruel, an awful")}
    batches = [{**tokenizer(x, return_tensors="pt"), "positive": flag} for flag, each in texts.items() for x in each]
    method = fit(GACT(), model, batches)
    asked = tokenizer("I think that the film was", return_tensors="pt")
    for strength in (-2.0, 0.0, 2.0):
        with attach(model, replace(method, strength=strength).on(layers=15)) as run:
            print(strength, tokenizer.decode(run.generate(**asked, max_new_tokens=8, do_sample=False)[0]))
