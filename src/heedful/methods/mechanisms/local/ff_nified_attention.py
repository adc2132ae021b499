"""o = V * gelu(K * (W x + c)): fixed kernels K and V over the patches around each in place of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu

from heedful.authoring import Call, Layer, Method, OddInt, Paper, Site, at
from heedful.kit.feature_maps import feature_map, laid_back, with_bias


class FFNifiedAttention(Method):
    """A convolution asks, a GELU decides and a convolution answers, channel by channel. For models trained with it."""

    paper = Paper(
        "P047",
        "MetaMixer Is All You Need",
        "Seokju Yun, Dongheon Lee, Youngmin Ro",
        2024,
        "2406.02021",
        differs=(
            "It is the token mixer alone, in any vision transformer: the authors' channel mixer, which convolves too, "
            "and their pyramid are not here.",
            "The model's norm comes before it and none within, as in the authors' models that enlarge images; those "
            "that name them have batch norms behind the map and each kernel, and a smaller kernel beside each.",
            "Tokens outside the grid of patches, as a class token, get nothing and are seen by none; the authors' "
            "models have none. Let the last layer attend, .on(layers=...), where a model reads a class token.",
            "Layers that are causal, or whose patches lie on no grid, are refused.",
            "Weights are drawn as torch.nn.Conv2d and Linear draw them, by a generator seeded by the layer's number; "
            "the authors draw narrow normal ones.",
        ),
    )
    subjects = ("image",)
    every_token = True
    kernel: OddInt = 7  # patches along a side of each kernel; the authors: 7, and 3 where images are large

    @classmethod
    def example(cls) -> FFNifiedAttention:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, k = torch.Generator().manual_seed(layer.number), layer.width, self.kernel
        return {
            **with_bias(random, "query", e, e),
            **with_bias(random, "key", e, 1, k, k),
            **with_bias(random, "value", e, 1, k, k),
        }

    @at(Site.BLOCK)
    def mix(self, hidden: Tensor, call: Call) -> Tensor:
        p = {name: x.to(hidden) for name, x in call.params.items()}
        around = {"padding": self.kernel // 2, "groups": hidden.shape[-1]}
        image = conv2d(feature_map(self, call, hidden), p["query"][..., None, None], p["query_bias"])
        image = gelu(conv2d(image, p["key"], p["key_bias"], **around))
        image = conv2d(image, p["value"], p["value_bias"], **around)
        return laid_back(self, call, image, torch.zeros_like(hidden))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, FFNifiedAttention(3)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
