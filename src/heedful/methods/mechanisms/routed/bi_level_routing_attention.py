"""softmax over the patches of the k regions whose mean key suits one's own region's mean query; values convolved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from heedful.authoring import Call, Layer, Mask, Method, OddInt, Paper, PositiveInt, Site, SiteError, at
from heedful.core.rules import Parts
from heedful.kit.chosen import SPARSE, Reached
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
    regions: PositiveInt = 7  # along each side; the paper: 7
    keep: PositiveInt = 4  # regions that a region sees; the paper: 1 to all, by stage
    kernel: OddInt = 5  # patches along a side of the convolution of values; the paper: 5

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

    @at(Site.MASK)
    @torch.no_grad()
    def route(self, mask: Mask, call: Call) -> Mask:
        if call.query is None or call.key is None:
            raise SiteError(f"{self!r}, layer {call.layer}: regions choose by queries and keys, and it is handed none")
        _, regions = self._laid_out(call)
        many, patches = regions.shape
        q, k = wide(call.query, call.spread(call.key))
        best = self._routes(q[:, :, regions], k[:, :, regions]).topk(min(self.keep, many)).indices  # [b regions keep]
        at = torch.arange(many, device=k.device)
        number = torch.full((k.shape[2],), many, device=k.device).index_copy(
            0, regions.flatten(), at.repeat_interleave(patches)
        )
        meet = torch.zeros(len(best), many, many, dtype=torch.bool, device=k.device).scatter(-1, best, True)
        meet = pad(meet, (0, 1, 0, 1), value=True)  # off the grid tokens see everything and are seen by all

        def pick(rows: slice, cols: slice | Tensor) -> Tensor:
            return meet[:, number[rows]][..., number[cols]][:, None]

        def reach(rows: slice) -> Tensor:
            return meet[:, number[rows]].flatten(0, 1).any(0)[number]

        def gather() -> tuple[Parts, ...]:
            if best.shape[-1] > SPARSE * many:
                return ()
            rest = (number == many).nonzero()[:, 0]
            others = rest.expand(*best.shape[:2], -1)
            found = (Parts(regions[None, None], torch.cat([regions[best].flatten(2), others], -1)[:, None]),)
            if not len(rest):
                return found
            everything = torch.arange(len(number), device=k.device)
            return *found, Parts(rest[None, None, None], everything[None, None, None])

        return mask & Reached(pick, reach, gather=gather)

    @at(Site.HEAD_OUTPUT)
    def convolve(self, heads: Tensor, call: Call) -> Tensor:
        if call.value is None:
            raise SiteError(f"{self!r}, layer {call.layer}: values are convolved, and it is handed none")
        cells = patch_tokens(self, call)
        (v,) = wide(call.spread(call.value))
        return heads.index_add(2, cells, self._convolved(v[:, :, cells], call).to(heads.dtype))

    def _routes(self, q: Tensor, k: Tensor) -> Tensor:
        """How well each region's key suits each region's query, all heads together, `[b regions regions]`."""
        query, key = (x.mean(3).transpose(1, 2).flatten(2) for x in (q, k))
        return query @ key.mT

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
