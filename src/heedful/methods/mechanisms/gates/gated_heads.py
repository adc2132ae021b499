"""Each head's output times sigmoid(w_h . x_h + c_h), a gate that looks at its slice of the layer's input by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, ProperShare
from heedful.core.sites import Site, at
from heedful.kit.feature_maps import drawn


class GatedHeads(Method):
    """A learned gate on every head and token, so that a head can do nothing without extreme scores."""

    paper = Paper(
        "P304",
        "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
        "Yelysei Bondarenko, Markus Nagel, Tijmen Blankevoort",
        2023,
        "2306.12929",
        "NeurIPS 2023",
        differs=(
            "A gate is one linear map, the paper's own choice; small nets in its place, as in the authors' script for "
            "BERT, are not here.",
            "A slice is the input's width over the number of heads, also where heads are wider or narrower; in the "
            "authors' models both are the same.",
            "The gate's weights come from a generator seeded by the layer's number and do not touch the global one.",
        ),
    )
    start: ProperShare = 0.5  # mean gate before training; the authors' default: 0.5, their OPT: 0.25
    fine_tune: bool = False  # start near the unedited model: small weights, and the gate divided by `start`
    # standard deviation of the weights when fine-tuning; the authors: OPT 0.001, BERT 0.01
    spread: NonNegativeFloat = 0.001
    whole: bool = False  # each gate looks at the whole input instead of its slice, an option of the authors' code

    @classmethod
    def neutral(cls) -> GatedHeads:
        return cls(start=0.5, fine_tune=True, spread=0.0)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        if layer.width % layer.heads and not self.whole:
            rule = f"gives each of {layer.heads} heads a slice of {layer.width} channels, which is no whole number"
            raise FieldError(self, "whole", self.whole, rule, True)
        shape = (layer.heads, layer.width if self.whole else layer.width // layer.heads)
        if self.fine_tune:
            weight = torch.randn(shape, generator=random) * self.spread
        else:
            weight = drawn(random, *shape)
        return {"weight": weight, "bias": torch.full((layer.heads,), math.log(self.start / (1 - self.start)))}

    @at(Site.HEAD_OUTPUT)
    def gate(self, heads: Tensor, call: Call) -> Tensor:
        b, _, q, _ = heads.shape
        if call.hidden is None or call.hidden.numel() != b * q * call.hidden.shape[-1]:
            raise SiteError(
                f"{self!r}, layer {call.layer}: the layer's input [b n e] is not known, and the gate needs it"
            )
        hidden = call.hidden.reshape(b, q, -1)
        weight = call.params["weight"] if self.whole else torch.block_diag(*call.params["weight"])  # [h e]
        gate = torch.sigmoid(torch.nn.functional.linear(hidden, weight, call.params["bias"]))
        if self.fine_tune:
            gate = gate / self.start
        return heads * gate.transpose(1, 2)[..., None]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, GatedHeads(fine_tune=True)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
