"""L_k = sum over |i - j| <= k of A_ij / n, a layer's mean over heads: how much of its attention a window would keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    Curves,
    Description,
    FieldError,
    Finding,
    Method,
    NonNegativeInt,
    Paper,
    Phase,
    Readings,
    Statistic,
    Sum,
    Summary,
    sums,
)


@dataclass(frozen=True, eq=False)
class Locality:
    """How local the attention of each layer is, by how far a window reaches."""

    within: Mapping[int, Tensor] = field(repr=False)  # [k+1]: the share that stays within 0, 1, ... k tokens

    def __getitem__(self, layer: int) -> float:
        """L_k of a layer."""
        return float(self.within[layer][-1])

    def most(self, share: float) -> tuple[int, ...]:
        """The most local layers, that share of them and one at least, in their order: graft these."""
        if not 0 < share <= 1:
            raise FieldError(self, "share", share, "must lie above 0 and be at most 1", 0.5)
        ranked = sorted(self.within, key=lambda layer: (-self[layer], layer))
        return tuple(sorted(ranked[: max(1, int(share * len(ranked)))]))

    def __str__(self) -> str:
        return "locality by layer: " + ", ".join(f"{layer}: {self[layer]:.0%}" for layer in self.within)


class Grafting(Method):
    """Tells which layers of a trained model look nearby, and so may have their attention replaced by a window.

    `run[method].most(0.5)` names half of the layers; `AttentionEditing(SinkWindow(4, 33).on(layers=...))` replaces what
    they do and teaches it.
    """

    paper = Paper(
        "P320",
        "Exploring Diffusion Transformer Designs via Grafting",
        "Keshigeyan Chandrasegaran, Michael Poli, Daniel Y. Fu, Dongjun Kim, Lea M. Hadzic, Manling Li, Agrim Gupta, "
        "Stefano Massaroli, Azalia Mirhoseini, Juan Carlos Niebles, Stefano Ermon, Li Fei-Fei",
        2025,
        "2506.05340",
        "NeurIPS 2025",
        differs=(
            "The authors' text was at hand in its abstract and others' accounts, and no measure of locality was found "
            "in their code.",
            "The measure of locality alone, on any model; replacing what a layer does, teaching it on the model's own "
            "activations and then the whole is AttentionEditing, and the authors' gated convolutions are not here.",
            "Places are those of tokens in their row, as in the paper, for images too.",
            "In causal models a band reaches back alone; the authors' see both ways.",
        ),
    )
    band: NonNegativeInt = 32  # tokens to either side, the paper's k; the authors: 32

    @classmethod
    def example(cls) -> Grafting:
        return cls(2)

    def idle(self, call: Call) -> bool:
        return call.cross or call.phase is Phase.DECODE

    @sums("distance")
    def measure(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.distance is None:
            return None
        whole = pattern.distance.double().sum((0, 1))  # [m], by distance from `nearest` on
        away = (torch.arange(len(whole), device=whole.device) + pattern.nearest).abs()
        near = whole.new_zeros(self.band + 1).index_add(0, away.clamp(max=self.band), whole * (away <= self.band))
        return Sum.of(torch.cat([near, whole.sum()[None]]))

    def answer(self, readings: Readings) -> Locality:
        found = {layer: stat.value for layer, stat in readings.items()}
        return Locality({layer: x[:-1].cumsum(0) / x[-1] for layer, x in found.items()})

    def describe(self, answer: Locality) -> Description:
        layers = list(answer.within)
        curves = Curves(
            "locality",
            "How local the layers are",
            f"The share of each layer's attention that goes to the {self.band} tokens to either side, the mean over "
            "its heads.",
            x=layers,
            lines={"share": torch.tensor([answer[layer] for layer in layers])},
            x_label="layer",
            y_label="share",
            folded=True,
        )
        top = answer.most(0.01)[0]
        text = f"Layer {top} is the most local: {answer[top]:.0%} of its attention stays within {self.band} tokens."
        return Description((curves,), findings=(Finding(text, 0.1 * answer[top], shows="locality"),))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with torch.no_grad(), attach(model, Grafting()) as run:
        run(**text)
        print(run[Grafting()], run[Grafting()].most(0.5))
