"""o = B [(z * W) F(z); W_k(z) conv z]: kernels that a small net makes of coordinates, and that the image changes."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, gelu, instance_norm

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.feature_maps import feature_map, laid_back, with_bias
from heedful.kit.patches import sides
from heedful.kit.running import wide

SHAPES = (6, 3, 2)  # of the gamma distributions that frequencies are drawn from, layer by layer; the authors' code


class HyperZZW(Method):
    """Kernels made of coordinates, which the image itself changes before it meets them. For models trained with it."""

    paper = Paper(
        "P321",
        "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
        "Harvie Zhang",
        2024,
        "2401.17948",
        differs=(
            "Of the authors' block it is the operator, one global branch and the local ones, side by side before the "
            "bottleneck, in any vision transformer; gates, the other branches, the norm and activation behind the "
            "bottleneck and, with a mix of channels, behind each local kernel, the loss of the slow nets, and an "
            "architecture without residuals are not here.",
            "Local kernels are told by the image and meet it; each of the authors' four is told by a mix of its "
            "channels, or meets one. The authors' first block has a global net one layer deeper.",
            "Each image changes local kernels by itself; in the authors' code the mean of a batch does. Their hidden "
            "states are renormed there, which is left out.",
            "The authors' factor on frequencies is not among the settings that could be read, and is 1 here; their "
            "class has 2000 unless told otherwise.",
            "Tokens outside the grid of patches, as a class token, get nothing and are seen by none; the authors' "
            "models have none. Let the last layer attend, .on(layers=...), where a model reads a class token.",
            "Layers that are causal, or whose patches lie on no grid, are refused.",
            "Weights are drawn by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    side: Annotated[int, Ge(2)] = 14  # patches along each side of the image; that of ViT-B/16
    kernels: tuple[int, ...] = (3, 9, 5, 7)  # patches along a side of each local kernel; the authors' code
    units: PositiveInt = 32  # channels within the nets that make kernels; the authors' code, 64 for the global one

    def __post_init__(self) -> None:
        if len(set(self.kernels)) < len(self.kernels) or not all(k > 0 and k % 2 for k in self.kernels):
            raise FieldError(self, "kernels", self.kernels, "must be odd numbers of patches, no two alike", (3, 5))

    @classmethod
    def example(cls) -> HyperZZW:
        return cls(4, (3,), 4)  # of the tiny model that laws are tried on

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, h = torch.Generator().manual_seed(layer.number), layer.width, self.units

        def even(rows: int, cols: int) -> Tensor:
            return (torch.rand(rows, cols, generator=random) * 2 - 1) * math.sqrt(3 / cols)

        def normal(rows: int, cols: int) -> Tensor:
            return torch.randn(rows, cols, generator=random) * math.sqrt(2 / cols)

        found = {"mixer": normal(e, e)}
        for size in (self.side, *self.kernels):
            name = "global" if "global_out" not in found else f"local_{size}"
            for i, shape in enumerate(SHAPES):
                wave = (torch.rand(h, 2, generator=random) * 2 - 1) / math.sqrt(2)
                often = -torch.rand(shape, h, 2, generator=random).clamp(min=1e-6).log().sum(0)  # Gamma(shape, 1)
                found |= {f"{name}_wave_{i}": 2 * math.pi * often * wave, f"{name}_wave_{i}_bias": torch.zeros(h)}
                if i:
                    found |= {f"{name}_mix_{i}": even(h, h), f"{name}_mix_{i}_bias": torch.ones(h)}
            found |= {f"{name}_place": torch.zeros(size, size)}
            found |= {f"{name}_out": even(e, h) / size, f"{name}_out_bias": torch.zeros(e)}
            if name != "global":
                found |= with_bias(random, f"{name}_narrow", h, e) | with_bias(random, f"{name}_told", h, h)
                for i in range(1, len(SHAPES)):
                    found |= {f"{name}_told_{i}": even(h, h), f"{name}_told_{i}_bias": torch.ones(h)}
                found |= {f"{name}_bias": torch.zeros(1)}
        branches = 1 + len(self.kernels)
        return found | {"out": normal(e, branches * e), "out_bias": torch.zeros(e)}

    @at(Site.BLOCK)
    def mix(self, hidden: Tensor, call: Call) -> Tensor:
        image = feature_map(self, call, hidden)
        if sides(call) != (self.side, self.side):
            rows, cols = sides(call)
            rule = f"makes kernels of {self.side} x {self.side} patches, and there are {rows} x {cols}"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        z, *rest = wide(image, *(w.to(image.dtype) for w in call.params.values()))  # waves are fast
        p = dict(zip(call.params, rest, strict=True))
        fast = instance_norm(conv2d(z, p["mixer"][..., None, None]))  # which takes a bias away
        found = [self.changed(z, _kernel(p, "global", self.side)) @ fast]
        for size in self.kernels:
            name = f"local_{size}"
            kernels = _kernel(p, name, size, self.told(p, name, z, size)).expand(len(z), -1, -1, -1)
            around = conv2d(
                z.flatten(0, 1)[None], kernels.flatten(0, 1)[:, None], padding=size // 2, groups=z.shape[:2].numel()
            )
            found.append(around.view_as(z) + p[f"{name}_bias"])
        return laid_back(self, call, _linear(p, "out", torch.cat(found, 1)), torch.zeros_like(hidden))

    def changed(self, z: Tensor, kernel: Tensor) -> Tensor:
        """The global kernel `[1 e rows cols]`, changed by the image `z [b e rows cols]`."""
        return z * kernel

    def told(self, p: dict[str, Tensor], name: str, z: Tensor, size: int) -> Tensor | None:
        """What the image has to say to each place of a local kernel `[b hidden size size]`."""
        return gelu(_linear(p, f"{name}_told", _linear(p, f"{name}_narrow", adaptive_avg_pool2d(z, size))))


def _linear(p: dict[str, Tensor], name: str, image: Tensor) -> Tensor:
    return conv2d(image, p[name][..., None, None], p[f"{name}_bias"])


def _kernel(p: dict[str, Tensor], name: str, size: int, told: Tensor | None = None) -> Tensor:
    """Waves of coordinates, multiplied layer by layer `[b|1 e size size]`."""
    along = torch.linspace(-1, 1, size, dtype=p["out"].dtype, device=p["out"].device)
    at = torch.stack(torch.meshgrid(along, along, indexing="ij"))[None]
    h = _linear(p, f"{name}_wave_0", at).sin()
    for i in range(1, len(SHAPES)):
        h = _linear(p, f"{name}_wave_{i}", at).sin() * _linear(p, f"{name}_mix_{i}", h) + p[f"{name}_place"]
        h = h if told is None else h * _linear(p, f"{name}_told_{i}", told)
    return _linear(p, f"{name}_out", h)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=16)
    with attach(model, HyperZZW(4, (3,), 4)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
