"""x sigmoid(norm(Z V softmax(q x))) + x sigmoid(softmax(mean Q x) U x): a gate of channels and one of patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from heedful.authoring import Call, FieldError, Layer, Method, Paper, Site, at
from heedful.kit.feature_maps import drawn, feature_map, laid_back


class PolarizedSelfAttention(Method):
    """Gates what attention hands over, by channel and by patch, each told by half the channels. For models with it."""

    paper = Paper(
        "P250",
        "Polarized Self-Attention: Towards High-quality Pixel-wise Regression",
        "Huajun Liu, Fuqiang Liu, Xinyi Fan, Dong Huang",
        2021,
        "2107.00782",
        differs=(
            "Behind the attention of a vision transformer, as behind a convolution in the authors' residual blocks.",
            "The formulas are the paper's, the same for both layouts. In the authors' code the gate of channels has a "
            "norm in the chain alone, within a narrower pair of maps with biases, and the softmax of the gate of "
            "patches is over patches: in the sum behind the product, which leaves that gate near a half, and in the "
            "chain of the values, with a query that has none.",
            "Tokens outside the grid of patches, as a class token, are left as they are; the authors' models have "
            "none. Layers that are causal, or whose patches lie on no grid, are refused.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number; the "
            "authors draw most of them normal. There are no biases but the norm's.",
        ),
    )
    subjects = ("image",)
    every_token = True
    sequential: bool = False  # channels, and then patches of what came of it; else the sum of both

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        if e % 2:
            raise FieldError(self, "sequential", self.sequential, f"halves channels, and there are {e}", False)
        return {
            "channel_query": drawn(random, 1, e), "channel_value": drawn(random, e // 2, e),
            "up": drawn(random, e, e // 2), "norm": torch.ones(e), "norm_bias": torch.zeros(e),
            "patch_query": drawn(random, e // 2, e), "patch_value": drawn(random, e // 2, e),
        }  # fmt: skip

    @at(Site.OUTPUT)
    def gate(self, output: Tensor, call: Call) -> Tensor:
        p = {name: x.to(output) for name, x in call.params.items()}
        image = feature_map(self, call, output).flatten(2)  # [b e n]
        first = image * _channels(image, p)
        gated = first * _patches(first, p) if self.sequential else first + image * _patches(image, p)
        return laid_back(self, call, gated, output)


def _channels(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What patches found by one query tell of each channel, `[b e 1]`."""
    pooled = (p["channel_value"] @ x) @ (p["channel_query"] @ x).softmax(-1).mT
    told = (p["up"] @ pooled)[..., 0]
    return layer_norm(told, told.shape[-1:], p["norm"], p["norm_bias"]).sigmoid()[..., None]


def _patches(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What channels found by the mean patch tell of each patch, `[b 1 n]`."""
    query = (p["patch_query"] @ x).mean(-1).softmax(-1)
    return (query[:, None] @ (p["patch_value"] @ x)).sigmoid()


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    for sequential in (False, True):
        with attach(model, PolarizedSelfAttention(sequential)) as run:
            print(sequential, run.difference(**models.tiny_inputs(model)))
