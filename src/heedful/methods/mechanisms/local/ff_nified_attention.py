"""o = V * gelu(K * (W x + c)): fixed kernels K and V over the patches around each in place of keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, Site, at
from heedful.kit.patches import patch_tokens, sides, whole_image


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
            "In causal models, and where the patches are no grid or not all are read at once, attention stays.",
            "Weights are drawn as torch.nn.Conv2d and Linear draw them, by a generator seeded by the layer's number; "
            "the authors draw narrow normal ones.",
        ),
    )
    subjects = ("image",)
    kernel: int = 7  # patches along a side of each kernel; the authors: 7, and 3 where images are large

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise FieldError(self, "kernel", self.kernel, "must be an odd number of patches", 7)

    @classmethod
    def example(cls) -> FFNifiedAttention:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, k = torch.Generator().manual_seed(layer.number), layer.width, self.kernel

        def drawn(*shape: int, fan: int) -> Tensor:
            return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(fan)

        return {
            "query": drawn(e, e, fan=e), "query_bias": drawn(e, fan=e),
            "key": drawn(e, 1, k, k, fan=k * k), "key_bias": drawn(e, fan=k * k),
            "value": drawn(e, 1, k, k, fan=k * k), "value_bias": drawn(e, fan=k * k),
        }  # fmt: skip

    def idle(self, call: Call) -> bool:
        return not whole_image(call)

    @at(Site.BLOCK)
    def mix(self, hidden: Tensor, call: Call) -> Tensor:
        p = {name: x.to(hidden) for name, x in call.params.items()}
        tokens, around = patch_tokens(self, call), {"padding": self.kernel // 2, "groups": hidden.shape[-1]}
        image = linear(hidden[:, tokens], p["query"], p["query_bias"]).mT.unflatten(-1, sides(call))
        image = gelu(conv2d(image, p["key"], p["key_bias"], **around))
        image = conv2d(image, p["value"], p["value_bias"], **around)
        return torch.zeros_like(hidden).index_copy(1, tokens, image.flatten(2).mT)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, FFNifiedAttention(3)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
