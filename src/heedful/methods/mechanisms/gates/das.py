"""x * sigmoid(norm(sum_t W_t s(p + t + d_t(p)))), s = gelu(norm(D x)): a gate that looks where it learns to look."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, grid_sample, group_norm, layer_norm

from heedful.authoring import Call, Layer, Method, OddInt, Paper, PositiveShare, Site, at
from heedful.kit.feature_maps import drawn, feature_map, laid_back
from heedful.kit.running import wide


class DAS(Method):
    """Gates what attention hands over, patch by patch, by patches that lie where offsets say. For training with it."""

    paper = Paper(
        "P169",
        "DAS: A Deformable Attention to Capture Salient Information in CNNs",
        "Farzad Salajegheh, Nader Asadi, Soroush Saryazdi, Sudhir Mudur",
        2023,
        "2311.12091",
        differs=(
            "Abstracts of the paper and others' code were at hand: the share of channels, the two norms and the GELU "
            "are as these have them, and offsets begin at zero, as those of deformable convolutions do.",
            "Behind the attention of a vision transformer, as behind a convolution in the authors' networks.",
            "Tokens outside the grid of patches, as a class token, are left as they are; the authors' models have "
            "none. Layers that are causal, or whose patches lie on no grid, are refused.",
            "Convolutions have no bias but that of offsets: the first norm would take it away, and the last has one "
            "of its own, where others' code has both. Weights are drawn as torch.nn.Conv2d draws them, by a generator "
            "seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    share: PositiveShare = 0.2  # of the channels that the gate is told by; the paper: 0.2
    kernel: OddInt = 3  # patches along a side of the convolutions; others' code: 3

    @classmethod
    def example(cls) -> DAS:
        return cls(0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, k = torch.Generator().manual_seed(layer.number), layer.width, self.kernel
        inner = max(1, round(self.share * e))
        return {
            "depth": drawn(random, e, 1, k, k), "narrow": drawn(random, inner, e, 1, 1),
            "offset": torch.zeros(2 * k * k, inner, k, k), "offset_bias": torch.zeros(2 * k * k),
            "look": drawn(random, e, inner, k, k), "norm": torch.ones(e), "norm_bias": torch.zeros(e),
        }  # fmt: skip

    @at(Site.OUTPUT)
    def gate(self, output: Tensor, call: Call) -> Tensor:
        image = feature_map(self, call, output)
        x, *rest = wide(image, *(w.to(image.dtype) for w in call.params.values()))  # samples are taken in 32 bits
        p, half = dict(zip(call.params, rest, strict=True)), self.kernel // 2
        told = conv2d(conv2d(x, p["depth"], padding=half, groups=x.shape[1]), p["narrow"])
        told = gelu(group_norm(told, told.shape[1]))  # each channel over its image
        offset = conv2d(told, p["offset"], p["offset_bias"], padding=half)
        seen = torch.einsum("bctyx,ect->byxe", self._sampled(told, offset), p["look"].flatten(2))
        gate = layer_norm(seen, seen.shape[-1:], p["norm"], p["norm_bias"]).sigmoid()
        return laid_back(self, call, x * gate.movedim(-1, 1), output)

    def _sampled(self, x: Tensor, offset: Tensor) -> Tensor:
        """What stands at each tap of the kernel `[b c taps rows cols]`, moved by `offset [b 2 taps rows cols]`.

        Offsets are in patches, down and across by turns; between patches it is linear, and zero off the image.
        """
        (rows, cols), taps = x.shape[2:], torch.arange(self.kernel, device=x.device) - self.kernel // 2
        down, across = (step.flatten()[:, None, None] for step in torch.meshgrid(taps, taps, indexing="ij"))
        move = offset.unflatten(1, (-1, 2))
        y = move[:, :, 0] + down + torch.arange(rows, device=x.device)[:, None]  # [b taps rows cols]
        z = move[:, :, 1] + across + torch.arange(cols, device=x.device)
        grid = torch.stack([(2 * z + 1) / cols - 1, (2 * y + 1) / rows - 1], -1)
        return grid_sample(x, grid.flatten(1, 2), align_corners=False).unflatten(2, (-1, rows))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, DAS(0.5)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
