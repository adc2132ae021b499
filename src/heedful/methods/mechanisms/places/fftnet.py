"""F^-1 modReLU((W + mlp(mean x)) F x), F Fourier's transform over places, W a learned filter of frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.running import wide

EPS = 1e-6  # beside the size of a frequency that is divided by; the authors' code


class FFTNet(Method):
    """A filter of frequencies over places, which the tokens' mean adapts. For image models trained with it."""

    paper = Paper(
        "P099",
        "The FFT Strikes Back: An Efficient Alternative to Self-Attention",
        "Jacob Fein-Ashley, Rajgopal Kannan, Viktor Prasanna",
        2025,
        "2502.18394",
        differs=(
            "The formula is that of the second version and of the code that goes with it; later ones add the filter's "
            "product with one plus the MLP, a bias before another activation, and local windows or wavelets.",
            "For images alone, whose tokens are always as many, and which no padding changes.",
            "The norm behind the sum with the residual is the model's affair. Nothing is dropped in training.",
            "Weights of the MLP are drawn by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    tokens: PositiveInt = 197  # of every image, a class token counted; that of ViT-B/16
    heads: int | None = None  # slices of channels with a filter each; None: the layer's heads

    @classmethod
    def example(cls) -> FFTNet:
        return cls(17)  # of the tiny model that laws are tried on

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        heads, waves = layer.heads if self.heads is None else self.heads, self.tokens // 2 + 1
        if heads < 1 or e % heads:
            raise FieldError(self, "heads", heads, f"must be 1 or more and divide the {e} channels", 1)

        def drawn(rows: int) -> Tensor:  # as the authors' code draws linear maps
            return (torch.rand(rows, e, generator=random) * 2 - 1) * math.sqrt(6 / (rows + e))

        return {
            "filter": torch.ones(heads, waves), "bias": torch.zeros(heads, waves),
            "in": drawn(e), "in_bias": torch.zeros(e),
            "out": drawn(heads * waves), "out_bias": torch.zeros(heads * waves),
        }  # fmt: skip

    @at(Site.BLOCK)
    def filter(self, hidden: Tensor, call: Call) -> Tensor:
        if call.mask.rules:
            rule = "frequencies are of all tokens, and there is a mask; restrict it to layers without one"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        if hidden.shape[1] != self.tokens:
            raise SiteError(
                f"{self!r}, layer {call.layer}: filters the frequencies of {self.tokens} places, and there are "
                f"{hidden.shape[1]} tokens; FFTNet({hidden.shape[1]}) has filters for these"
            )
        p = call.params
        x, *rest = wide(hidden.to(p["filter"].dtype), *p.values())  # there is no transform of less than 32 bits
        p = dict(zip(p, rest, strict=True))
        told = linear(gelu(linear(x.mean(1), p["in"], p["in_bias"])), p["out"], p["out_bias"])
        scale = p["filter"] + told.unflatten(-1, p["filter"].shape)  # [b h waves]
        waves = torch.fft.rfft(x.unflatten(-1, (len(p["filter"]), -1)), dim=1, norm="ortho")  # [b waves h c]
        waves = waves * scale.mT[..., None]
        size = waves.abs()
        waves = waves * ((size + p["bias"].mT[..., None]).relu() / (size + EPS))
        return torch.fft.irfft(waves, n=self.tokens, dim=1, norm="ortho").flatten(2).to(hidden.dtype)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, FFTNet(5)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
