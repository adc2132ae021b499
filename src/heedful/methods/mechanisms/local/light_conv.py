"""Out = W_o conv(GLU(W_i x)): each channel is a mean of its last few tokens, weights softmax(w) shared by heads."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, at
from heedful.methods.mechanisms.local._convolution import (
    KERNELS,
    convolved,
    drawn,
    heads_of,
    kernel_of,
    projections,
    require_kernels,
)


class LightConv(Method):
    """Lightweight convolution in place of attention: the same weights at every token. For models trained with it."""

    paper = Paper(
        "P255",
        "Pay Less Attention with Lightweight and Dynamic Convolutions",
        "Felix Wu, Angela Fan, Alexei Baevski, Yann Dauphin, Michael Auli",
        2019,
        "1901.10430",
        "ICLR 2019",
        differs=(
            "No weights of the kernels are dropped in training (the authors' DropConnect).",
            "There are as many kernels as the layer has heads unless `heads` says otherwise; the authors have 16.",
            "First weights come from a generator seeded by the layer's number and do not touch the global one.",
        ),
    )
    kernels: tuple[int, ...] = KERNELS  # tokens by layer, the last for all further ones; the paper: 3, 7, 15, 31
    heads: int | None = None  # kernels that the channels share; None: the layer's heads; the paper: 16

    def __post_init__(self) -> None:
        require_kernels(self, self.kernels)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        shared = projections(random, layer.width)
        heads = heads_of(self, self.heads, layer)
        return {**shared, "kernel": drawn(random, heads, 1, kernel_of(self.kernels, layer.number))[:, 0]}

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
