"""x_i + alpha beta_i x_i for the few channels i of heads whose sign of change a trait decides best, as beta says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.seeds import seed_of
from heedful.methods.intervene.language._contrast import TEXTS, contrast


class AUSteer(Method):
    """Scales single channels of heads, those that most pairs of texts agree about, each as far as they agree.

    `fit` takes batches of the model's inputs with `positive` beside them, a bool for the batch or `[b]`, and looks at
    each text's last token; the first text with the trait is paired with the first without, and so on.
    """

    paper = Paper(
        "P302",
        "Fine-Grained Activation Steering: Steering Less, Achieving More",
        "Zijian Feng, Tianjiao Li, Zixiao Zhu, Hanzhang Zhou, Junlang Qian, Li Zhang, Jia Jim Deryl Chua, "
        "Lee Onn Mak, Gee Wah Ng, Kezhi Mao",
        2026,
        "2602.04428",
        "ICLR 2026",
        differs=(
            "The authors also steer the outputs of feed-forward blocks or of whole layers, and choose among the three "
            "for each task; here it is what heads hand to the output projection.",
            "How many channels and how strongly is the authors' choice for each task by its test; the defaults are of "
            "their order.",
        ),
    )
    count: PositiveInt = 100  # channels that a fit takes, of all layers together; the authors' scripts: 2 to 100
    strength: float = 10.0  # alpha, below 0 turns away from the trait; the authors' scripts: 8 to 100
    momenta: Fitted | None = None  # "beta.LAYER" [h d], 0 for channels that were not taken, from a fit
    seed: int | None = None  # without a fit: random momenta in every channel

    @classmethod
    def neutral(cls) -> AUSteer:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> AUSteer:
        return cls(strength=0.5, seed=0)

    def idle(self, call: Call) -> bool:
        found = None if self.momenta is None else self.momenta.get(f"beta.{call.layer}")
        return self.strength == 0 or (found is not None and not bool(found.any()))

    @at(Site.HEAD_OUTPUT)
    def steer(self, heads: Tensor, call: Call) -> Tensor:
        return heads * self._factor(heads.shape[1], heads.shape[3], call.layer).to(heads)[:, None]

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        if self.strength == 0:
            return weights
        return replace(weights, o=weights.o * self._factor(layer.heads, layer.value_dim, layer.number).to(weights.o))

    def _factor(self, h: int, d: int, layer: int) -> Tensor:
        """1 + alpha beta, `[h d]`."""
        if self.momenta is None:
            draw = torch.Generator().manual_seed(1_000_003 * seed_of(self, "momenta", TEXTS) + layer)
            return 1 + self.strength * (2 * torch.rand(h, d, generator=draw) - 1)
        found = self.momenta.get(f"beta.{layer}")
        if found is None or found.shape != (h, d):
            rule = f"were fitted to another model: layer {layer} has [h d] = {[h, d]} here"
            raise FieldError(self, "momenta", self.momenta, rule, "heedful.fit(AUSteer(), model, batches)")
        return 1 + self.strength * found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AUSteer:
        """The share of pairs whose trait moves a channel the more common way, with that way's sign; the best stay."""
        found = contrast(self, context, Site.HEAD_OUTPUT, batches, paired=True)
        moves = {layer: one.trait - one.other for layer, one in sorted(found.items())}
        betas = {}
        for layer, move in moves.items():
            up, down = (move > 0).double().mean(0), (move < 0).double().mean(0)
            betas[layer] = torch.where(up < down, -down, up)
        every = torch.cat([beta.flatten() for beta in betas.values()])
        kept = torch.zeros_like(every)
        best = every.abs().argsort(descending=True, stable=True)[: self.count]
        kept[best] = every[best]
        parts = kept.split([beta.numel() for beta in betas.values()])
        named = zip(betas.items(), parts, strict=True)
        return replace(
            self, momenta=Fitted({f"beta.{layer}": part.view_as(beta).float() for (layer, beta), part in named})
        )


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    texts = {True: ("What a lovely", "How kind, a wonderful"), False: ("What a horrid", "How cruel, an awful")}
    batches = [{**tokenizer(x, return_tensors="pt"), "positive": flag} for flag, each in texts.items() for x in each]
    method = fit(AUSteer(), model, batches)
    asked = tokenizer("I think that the film was", return_tensors="pt")
    for strength in (-2.0, 2.0):
        with attach(model, replace(method, strength=strength)) as run:
            print(strength, tokenizer.decode(run.generate(**asked, max_new_tokens=8, do_sample=False)[0]))
