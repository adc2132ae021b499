"""t ReLU(q) (ReLU(k)ᵀ v) / max(ReLU(q) sum ReLU(k), 100), and what two convolutions make of it added to the output."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm

from heedful.authoring import Call, Layer, Method, OddInt, Paper, PositiveFloat, Site, at
from heedful.kit.patches import patch_tokens, sides, whole_image
from heedful.kit.running import Running, wide


class EnhancedLinearAttention(Method):
    """L2ViT's linear attention for images, and its local concentration module. For models trained with it."""

    paper = Paper(
        "P107",
        "The Linear Attention Resurrection in Vision Transformer",
        "Chuanyang Zheng",
        2025,
        "2501.16182",
        differs=(
            "It is the linear one of the two attentions alone, in any vision transformer: the authors have windows in "
            "every second layer, convolutions for positions, and a pyramid.",
            "The module sees the attention's output, a + LCM(LN(a)), where the authors add that to the stream first; "
            "a site of the attention does not hold the stream.",
            "Between the convolutions each channel is normed over the image's own patches; the authors have a batch "
            "norm there.",
            "Tokens outside the grid of patches, as a class token, take part in the sums and pass the module by; the "
            "authors' models have none.",
            "In causal models, and where the patches are no grid or not all are read at once, softmax stays.",
            "Convolutions are drawn as torch.nn.Conv2d draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    kernel: OddInt = 7  # patches along a side of each convolution; the authors: 7
    least: PositiveFloat = 100.0  # the least sum of weights that is divided by; the authors: 100

    @classmethod
    def example(cls) -> EnhancedLinearAttention:
        return cls(3, 1.0)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, k = torch.Generator().manual_seed(layer.number), layer.width, self.kernel
        ones, zeros = torch.ones(e), torch.zeros(e)

        def drawn(*side: int) -> Tensor:
            return (torch.rand(e, *side, generator=random) * 2 - 1) / k

        return {
            "temperature": torch.full((layer.heads,), 1 / math.sqrt(layer.head_dim)),
            "norm": ones, "norm_bias": zeros, "first": drawn(k, k), "first_bias": drawn(),
            "inner": ones.clone(), "inner_bias": zeros.clone(), "second": drawn(k, k), "second_bias": drawn(),
        }  # fmt: skip

    def idle(self, call: Call) -> bool:
        return not whole_image(call)

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k)
        values = torch.cat([running.cut(v), running.ones(v)], -1)  # a 1 beside each value sums the weights as well
        mixed = running.mixed("products", q.relu(), running.cut(k.relu()), values)
        temperature = call.params["temperature"].to(mixed)[:, None, None]
        return temperature * mixed[..., :-1] / mixed[..., -1:].clamp(min=self.least)

    @at(Site.OUTPUT)
    def concentrate(self, output: Tensor, call: Call) -> Tensor:
        tokens = patch_tokens(self, call)
        p = {name: x.to(output) for name, x in call.params.items()}
        image = layer_norm(output[:, tokens], output.shape[-1:], p["norm"], p["norm_bias"])
        image = gelu(_convolved("first", image.mT.unflatten(-1, sides(call)), p))
        image = layer_norm(image, image.shape[-2:])  # each channel by itself
        image = image * p["inner"][:, None, None] + p["inner_bias"][:, None, None]
        return output.index_add(1, tokens, _convolved("second", image, p).flatten(2).mT)


def _convolved(name: str, image: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Each channel `[b e y x]` over the patches around each."""
    kernel = p[name][:, None]
    return conv2d(image, kernel, p[f"{name}_bias"], padding=kernel.shape[-1] // 2, groups=len(kernel))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, EnhancedLinearAttention(3)) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
