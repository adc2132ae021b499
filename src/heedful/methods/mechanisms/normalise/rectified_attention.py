"""Weights relu(score), rows not normalised; then o * g / rms(o) * sigmoid(w * o) over all heads of a token together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat
from heedful.core.sites import Site, at
from heedful.core.weighing import Weighing, weighs


class RectifiedAttention(Method):
    """ReLA: a key with a score below zero gets nothing, and a head may look at nothing. For models trained with it."""

    paper = Paper(
        "P228",
        "Sparse Attention with Linear Units",
        "Biao Zhang, Ivan Titov, Rico Sennrich",
        2021,
        "2104.07012",
        "EMNLP 2021",
        differs=(
            "The gated norm of the authors' code (ReLA-g); their other variant has a special initialisation instead.",
            "The gate's weights come from a generator seeded by the layer's number and do not touch the global one.",
            "Masked pairs weigh nothing; the authors multiply their scores by zero, which is the same.",
        ),
    )
    # added to the mean square of a token's heads; the authors' code: 1e-8
    eps: PositiveFloat = 1e-8

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        size = layer.heads * layer.value_dim
        random = torch.Generator().manual_seed(layer.number)
        bound = math.sqrt(3 / size)  # as TensorFlow draws a vector
        gate = (torch.rand(size, generator=random) * 2 - 1) * bound
        return {"scale": torch.ones(size), "gate": gate}

    @weighs
    def rectify(self, call: Call) -> Weighing:
        return Weighing("relu")

    @at(Site.HEAD_OUTPUT)
    def norm(self, heads: Tensor, call: Call) -> Tensor:
        x = heads.transpose(1, 2).flatten(2).float()  # [b q h*d]
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * torch.sigmoid(call.params["gate"] * x)
        return (call.params["scale"] * x).unflatten(-1, (heads.shape[1], -1)).transpose(1, 2).to(heads.dtype)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, RectifiedAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
