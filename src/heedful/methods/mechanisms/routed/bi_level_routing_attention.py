"""softmax over the patches of the k regions whose mean key suits one's own region's mean query; values convolved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from heedful.authoring import Call, FieldError, Layer, Method, Paper, Site, at
from heedful.kit.patches import patch_tokens, require_divides, sides, whole_image
from heedful.kit.running import wide


class BiLevelRoutingAttention(Method):
    """Regions of an image choose regions, and their patches meet. For models trained with it."""

    paper = Paper(
        "P067",
        "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "Lei Zhu, Xinjiang Wang, Zhanghan Ke, Wayne Zhang, Rynson Lau",
        2023,
        "2303.08810",
        "CVPR 2023",
        differs=(
            "It is the attention alone, in any vision transformer: the authors' pyramid, whose stages choose 1, 4, 16 "
            "and then all 49 regions, is not here.",
            "Tokens outside the grid of patches, as a class token, see everything and are seen by all; the authors' "
            "models have none.",
            "Scores have the model's own scale, where the authors divide by the root of all heads' channels together.",
            "In causal models, and where the patches are no grid or not all are read at once, softmax stays.",
            "The convolution is drawn as torch.nn.Conv2d draws it, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    regions: int = 7  # along each side; the paper: 7
    keep: int = 4  # regions that a region sees; the paper: 1 to all, by stage
    kernel: int = 5  # patches along a side of the convolution of values; the paper: 5

    def __post_init__(self) -> None:
        if self.regions < 1:
            raise FieldError(self, "regions", self.regions, "must be 1 or more along each side", 7)
        if self.keep < 1:
            raise FieldError(self, "keep", self.keep, "must be 1 or more regions", 4)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise FieldError(self, "kernel", self.kernel, "must be an odd number of patches", 5)

    @classmethod
    def example(cls) -> BiLevelRoutingAttention:
        return cls(2, 1, 3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, bound = torch.Generator().manual_seed(layer.number), 1 / self.kernel
        kernel, bias = (
            (torch.rand(layer.heads, layer.value_dim, *side, generator=random) * 2 - 1) * bound
            for side in ((self.kernel, self.kernel), ())
        )
        return {"kernel": kernel, "bias": bias}

    def idle(self, call: Call) -> bool:
        return not whole_image(call)

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        k, v = call.spread(k), call.spread(v)
        cells, regions = self._laid_out(call)
        rest = torch.ones(q.shape[2], dtype=torch.bool, device=q.device).index_fill(0, cells, False)
        near, near_k, near_v = (x[:, :, regions] for x in (q, k, v))  # [b h regions patches d]
        best = self._routes(near, near_k).topk(min(self.keep, len(regions))).indices  # [b regions keep]

        def seen(near: Tensor, all_tokens: Tensor) -> Tensor:
            """What patches see of keys or values, by region, `[b h regions . d]`."""
            found = torch.stack([x[:, chosen] for x, chosen in zip(near, best, strict=True)]).flatten(3, 4)
            others = all_tokens[:, :, rest, None].transpose(2, 3).expand(-1, -1, len(regions), -1, -1)
            return torch.cat([found, others], 3)

        out = torch.zeros_like(v)
        out[:, :, rest] = self._mixed(q[:, :, rest], k, v, call)
        out[:, :, regions.flatten()] = self._mixed(near, seen(near_k, k), seen(near_v, v), call).flatten(2, 3)
        return out.index_add(2, cells, self._convolved(v[:, :, cells], call))

    def _routes(self, q: Tensor, k: Tensor) -> Tensor:
        """How well each region's key suits each region's query, all heads together, `[b regions regions]`."""
        query, key = (x.detach().mean(3).transpose(1, 2).flatten(2) for x in (q, k))
        return query @ key.mT

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return (q @ k.mT * call.scale).softmax(-1) @ v

    def _laid_out(self, call: Call) -> tuple[Tensor, Tensor]:
        """Which tokens are the patches, row by row `[patches]`, and region by region `[regions patches]`."""
        require_divides(self, "regions", call)
        (rows, cols), cells = sides(call), patch_tokens(self, call)
        grid = cells.view(self.regions, rows // self.regions, self.regions, cols // self.regions)
        return cells, grid.transpose(1, 2).reshape(self.regions**2, -1)

    def _convolved(self, v: Tensor, call: Call) -> Tensor:
        """Each channel of the values of patches `[b h patches d]`, over those around each."""
        kernel, bias = (call.params[name].to(v) for name in ("kernel", "bias"))
        image = v.mT.flatten(1, 2).unflatten(-1, sides(call))
        found = conv2d(
            image, kernel.flatten(0, 1)[:, None], bias.flatten(), padding=self.kernel // 2, groups=bias.numel()
        )
        return found.flatten(2).unflatten(1, bias.shape).mT


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, BiLevelRoutingAttention(4, 2)) as run:
        print(run.difference(**inputs))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
