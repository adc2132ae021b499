"""Out = W_o conv(GLU(W_i x)): each channel is a mean of its last few tokens, weights softmax(w) shared by heads."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Site, at
from heedful.methods.mechanisms.local._convolution import (
    PAPER,
    Convolution,
    convolved,
    drawn,
    projections,
)


class LightConv(Convolution):
    """Lightweight convolution in place of attention: the same weights at every token. For models trained with it."""

    paper = PAPER

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        shared = projections(random, layer.width)
        heads = self.shared_by(layer)
        return {**shared, "kernel": drawn(random, heads, 1, self.kernel(layer.number))[:, 0]}

    @at(Site.BLOCK)
    def convolve(self, x: Tensor, call: Call) -> Tensor:
        scores = call.params["kernel"][None, None]  # [1 1 h kernel]
        return convolved(x, call, scores.shape[-1], lambda _: scores)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, LightConv()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
