"""o = P (y * sum_i W_i f_i(y_i)), y = D C x: parts of a convolved image, their low frequencies lifted, gate it."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn.functional import conv2d

from heedful.authoring import Call, FieldError, Layer, Method, NonNegativeFloat, OddInt, Paper, Share, Site, at
from heedful.kit.feature_maps import feature_map, laid_back, with_bias
from heedful.kit.running import wide


class SPANet(Method):
    """An image multiplied with itself, low frequencies weighed more than high ones. For models trained with it."""

    paper = Paper(
        "P127",
        "SPANet: Frequency-balancing Token Mixer using Spectral Pooling Aggregation Modulation",
        "Guhnoo Yun, Juhan Yoo, Kijung Kim, Jeongho Lee, Dong Hwan Kim",
        2023,
        "2308.11568",
        "ICCV 2023",
        differs=(
            "It is the token mixer alone (SPAM), in any vision transformer: the authors' pyramid, and the factors on "
            "their residual stream, are not here.",
            "Frequencies as far from zero as the radius count as high ones, as in the paper; the authors' code has a "
            "third weight for these.",
            "Tokens outside the grid of patches, as a class token, get nothing and are seen by none; the authors' "
            "models have none. Let the last layer attend, .on(layers=...), where a model reads a class token.",
            "Layers that are causal, or whose patches lie on no grid, are refused.",
            "Weights are drawn by a generator seeded by the layer's number, as torch.nn.Conv2d draws them.",
        ),
    )
    subjects = ("image",)
    every_token = True
    # weight of low frequencies, part by part of the channels; the paper
    balances: Annotated[tuple[Share, ...], MinLen(1)] = (0.7, 0.8, 0.9)
    # waves across the image below which a frequency is low; the paper: 2, in later stages 1
    radius: NonNegativeFloat = 2.0
    kernel: OddInt = 7  # patches along each of the two convolutions; the authors' code: 7

    @classmethod
    def example(cls) -> SPANet:
        return cls(kernel=3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, k = torch.Generator().manual_seed(layer.number), layer.width, self.kernel
        parts = torch.arange(e).chunk(len(self.balances))
        if len(parts) < len(self.balances):
            rule = f"must not be more than the {e} channels of the model divide into"
            raise FieldError(self, "balances", self.balances, rule, (0.7,))
        found = with_bias(random, "in", e, e, 1, 1)
        found |= with_bias(random, "across", e, 1, 1, k) | with_bias(random, "down", e, 1, k, 1)
        for i, part in enumerate(parts):
            found |= with_bias(random, f"part_{i}", e, len(part), 1, 1)
        return found | with_bias(random, "out", e, e, 1, 1)

    @at(Site.BLOCK)
    def mix(self, hidden: Tensor, call: Call) -> Tensor:
        image = feature_map(self, call, hidden)
        x, *rest = wide(image, *(w.to(image.dtype) for w in call.params.values()))  # transforms need 32 bits
        p = dict(zip(call.params, rest, strict=True))

        def convolved(y: Tensor, name: str, padding: tuple[int, int] = (0, 0), groups: int = 1) -> Tensor:
            return conv2d(y, p[name], p[f"{name}_bias"], padding=padding, groups=groups)

        e, half = x.shape[1], self.kernel // 2
        x = convolved(convolved(x, "in"), "across", padding=(0, half), groups=e)
        x = convolved(x, "down", padding=(half, 0), groups=e)
        parts = zip(x.chunk(len(self.balances), 1), self.balances, strict=True)
        told = [convolved(self._balanced(y, low), f"part_{i}") for i, (y, low) in enumerate(parts)]
        return laid_back(self, call, convolved(x * torch.stack(told).sum(0), "out"), torch.zeros_like(hidden))

    def _balanced(self, x: Tensor, low: float) -> Tensor:
        """Low frequencies of `[b c rows cols]` times `low`, high ones times what is left of 1."""
        rows, cols = x.shape[2:]
        down, across = (torch.fft.fftfreq(n, 1 / n, dtype=x.dtype, device=x.device) for n in (rows, cols))
        near = down[:, None].square() + across.square() < self.radius**2
        waves = torch.fft.fft2(x) * torch.where(near, x.new_tensor(low), x.new_tensor(1 - low))
        return torch.fft.ifft2(waves).real


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    for low in (0.2, 0.5, 0.8):
        with attach(model, SPANet((low,), kernel=3)) as run:
            print(low, run.difference(**models.tiny_inputs(model)))
