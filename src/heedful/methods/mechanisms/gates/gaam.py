"""o_j = x_j softmax_j(-sum_i (x_j - m - u_i)^2 / 2 c_i^2 v), m and v a channel's mean and variance, u and c learned."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at

LEAST = 1e-8  # added to a variance; the authors' code


class GAAM(Method):
    """Tokens gated, channel by channel, by how likely a few Gaussians find them. For image models trained with it."""

    paper = Paper(
        "P033",
        "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
        "Georgios Ioannides, Aman Chadha, Aaron Elkins",
        2024,
        "2401.11143",
        differs=(
            "In a block's place, over the tokens of an image; the authors put it behind a frozen encoder, and let it "
            "weigh whatever axis is chosen, such as the encoder's layers.",
            "Gaussians are multiplied, as in the authors' package; its first versions add them, and scripts of their "
            "experiments have a single one for each feature, whose weights need not add up to one. The product over "
            "its sum is a softmax of the sum of their exponents, which cannot underflow and needs no bound.",
            "Spreads begin as exponentials of normal numbers, which keeps them from zero, where the authors' begin as "
            "normal numbers; they are drawn by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    # runs of tokens, each with Gaussians of its own, the last with what is left; the authors' example
    heads: PositiveInt = 4
    gaussians: PositiveInt = 5  # of a head; the authors' example

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        shape, random = (self.heads, self.gaussians), torch.Generator().manual_seed(layer.number)
        return {"offset": torch.zeros(shape), "spread": torch.randn(shape, generator=random).exp()}

    @at(Site.BLOCK)
    def weigh(self, hidden: Tensor, call: Call) -> Tensor:
        if call.mask.rules:
            rule = "means and variances are of all tokens, and there is a mask; restrict it to layers without one"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        size = hidden.shape[1] // self.heads
        if size < 2:
            raise SiteError(
                f"{self!r}, layer {call.layer}: {self.heads} heads need two tokens each, and there are "
                f"{hidden.shape[1]}; take fewer heads"
            )
        x = hidden.to(call.params["offset"].dtype)
        parts = x.split([*[size] * (self.heads - 1), x.shape[1] - size * (self.heads - 1)], 1)
        gaussians = zip(call.params["offset"], call.params["spread"], strict=True)
        return torch.cat([part * _likely(part, *own) for part, own in zip(parts, gaussians, strict=True)], 1)


def _likely(x: Tensor, offset: Tensor, spread: Tensor) -> Tensor:
    """Each channel's weights of the tokens of one head, `[b n e]`."""
    from_mean = (x - x.mean(1, keepdim=True))[..., None] - offset
    squares = from_mean.square() / (x.var(1, keepdim=True) + LEAST)[..., None]
    return (-squares / (2 * spread.square())).sum(-1).softmax(1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, GAAM(2)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
