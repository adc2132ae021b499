"""W lrelu(a A(y) + (1 - a) N y), a = softmax(mlp(mean y) / t): a gated and a plain branch, mixed image by image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, leaky_relu, linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveFloat, PositiveInt, Site, at
from heedful.kit.feature_maps import drawn, feature_map, laid_back, with_bias

SLOPE = 0.2  # of what is below zero; the authors


class AttentionInAttention(Method):
    """Convolutions with and without a gate of pixels; the image tells how much of each. For models trained with it."""

    paper = Paper(
        "P246",
        "Attention in Attention Network for Image Super-Resolution",
        "Haoyu Chen, Jinjin Gu, Zhi Zhang",
        2021,
        "2104.09497",
        differs=(
            "The authors' block in place of attention in a vision transformer, over patches in place of pixels; the "
            "model's norm stands before it, where they have none, and their enlarging of images is not here.",
            "Tokens outside the grid of patches, as a class token, get nothing and are seen by none; the authors' "
            "models have none. Let the last layer attend, .on(layers=...), where a model reads a class token.",
            "Layers that are causal, or whose patches lie on no grid, are refused.",
            "Weights are drawn as torch.nn.Conv2d draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    temperature: PositiveFloat = 30.0  # t, that the two scalars are divided by; the authors: 30
    reduction: PositiveInt = 4  # how many times narrower the scalars' inner layer is than the channels; the authors: 4

    @classmethod
    def example(cls) -> AttentionInAttention:
        return cls(1.0)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        if self.reduction > e:
            raise FieldError(self, "reduction", self.reduction, f"must not be above the {e} channels of the model", 4)
        inner = e // self.reduction
        return {
            "first": drawn(random, e, e, 1, 1), "last": drawn(random, e, e, 1, 1),
            "narrow": drawn(random, inner, e), "shares": drawn(random, 2, inner),
            "look": drawn(random, e, e, 3, 3), **with_bias(random, "gate", e, e, 1, 1),
            "value": drawn(random, e, e, 3, 3), "gated": drawn(random, e, e, 3, 3), "plain": drawn(random, e, e, 3, 3),
        }  # fmt: skip

    @at(Site.BLOCK)
    def mix(self, hidden: Tensor, call: Call) -> Tensor:
        p = {name: x.to(hidden) for name, x in call.params.items()}
        x = leaky_relu(conv2d(feature_map(self, call, hidden), p["first"]), SLOPE)
        told = linear(linear(x.mean((2, 3)), p["narrow"]).relu(), p["shares"])
        shares = self.shares(told)[..., None, None, None]  # [b 2 1 1 1]
        gate = conv2d(leaky_relu(conv2d(x, p["look"], padding=1), SLOPE), p["gate"], p["gate_bias"]).sigmoid()
        gated = conv2d(conv2d(x, p["value"], padding=1) * gate, p["gated"], padding=1)
        mixed = shares[:, 0] * gated + shares[:, 1] * conv2d(x, p["plain"], padding=1)
        return laid_back(self, call, conv2d(leaky_relu(mixed, SLOPE), p["last"]), torch.zeros_like(hidden))

    def shares(self, told: Tensor) -> Tensor:
        """Of the gated branch and of the plain one, `[b 2]`, by the two scalars that an image tells."""
        return (told / self.temperature).softmax(-1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, AttentionInAttention()) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
