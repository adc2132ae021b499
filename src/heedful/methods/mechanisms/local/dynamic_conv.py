"""Out = W_o conv(GLU(W_i x)): each channel is a mean of its last few tokens, weights softmax(W z_t) of token z_t."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, Layer, Site, at
from heedful.methods.mechanisms.local._convolution import (
    PAPER,
    Convolution,
    convolved,
    drawn,
    projections,
)


class DynamicConv(Convolution):
    """Dynamic convolution in place of attention: each token predicts its weights. For models trained with it."""

    paper = PAPER

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        shared = projections(random, layer.width)
        heads, kernel = self.shared_by(layer), self.kernel(layer.number)
        return {**shared, "kernel": drawn(random, heads * kernel, layer.width)}

    @at(Site.BLOCK)
    def convolve(self, x: Tensor, call: Call) -> Tensor:
        weight, kernel = call.params["kernel"], self.kernel(call.layer)
        return convolved(x, call, kernel, lambda inner: linear(inner, weight).unflatten(-1, (-1, kernel)))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, DynamicConv()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
