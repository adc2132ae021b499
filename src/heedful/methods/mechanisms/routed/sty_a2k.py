"""softmax over one key and value for each region of the style, and over the patches of the region that suits best."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, at
from heedful.kit.patches import patch_keys, patch_tokens, require_divides, sides
from heedful.kit.running import wide


class StyA2K(Method):
    """Patches look at regions on the whole, and into one that their own region chose. For models trained so.

    It stands in cross-attention, where queries are an image's content and keys another's style, or within one image.
    """

    paper = Paper(
        "P110",
        "All-to-key Attention for Arbitrary Style Transfer",
        "Mingrui Zhu, Xiao He, Nannan Wang, Xiaoyu Wang, Xinbo Gao",
        2023,
        "2212.04105",
        "ICCV 2023",
        differs=(
            "Both branches look with the layer's own projections and are added up before its last one, where the "
            "authors give each its own; content and style are not standardised first, and what joins layers, the "
            "decoder and the losses are not here.",
            "Scores over keys have the layer's scale; the authors' have none. Those that choose a region, and that "
            "tell how alike a key is to its region, have none here either.",
            "Content and style have as many rows and columns of patches.",
            "Tokens outside the grid of patches, as a class token, keep the model's own softmax over all tokens, and "
            "patches do not see them.",
            "In causal models, and where patches lie on no grid of rows and columns, softmax stays.",
        ),
    )
    subjects = ("image",)
    region: PositiveInt = 8  # patches along a side; the authors' code: 8, and 4 in the deepest layer

    @classmethod
    def example(cls) -> StyA2K:
        return cls(2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"slope": torch.ones(1), "bias": torch.zeros(1)}

    def idle(self, call: Call) -> bool:
        grid = getattr(call.roles.get("patches"), "grid", None)
        return call.causal or grid is None or len(grid) != 2

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        k, v = call.spread(k), call.spread(v)
        asking, seen = self._regions(call)
        rest = torch.ones(q.shape[2], dtype=torch.bool, device=q.device).index_fill(0, asking.flatten(), False)
        out = v.new_zeros(*q.shape[:3], v.shape[-1])
        out[:, :, rest] = (q[:, :, rest] @ k.mT * call.scale).softmax(-1) @ v
        queries, keys, values = q[:, :, asking], k[:, :, seen], v[:, :, seen]  # [b h regions patches d]
        found = self.distributed(queries, keys, values, call) + self.progressive(queries, keys, values, call)
        return out.index_copy(2, asking.flatten(), found.flatten(2, 3))

    def distributed(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """What patches get of one key and value for each region, made of those that are like its mean."""
        slope, bias = (call.params[name].to(k) for name in ("slope", "bias"))
        like = (bias + slope * (k * k.mean(3, keepdim=True)).sum(-1, keepdim=True)).sigmoid()
        key, value = ((like * x).sum(3).add(x.mean(3)) / (k.shape[3] + 1) for x in (k, v))  # [b h regions d]
        return (q @ key[:, :, None].mT * call.scale).softmax(-1) @ value[:, :, None]

    def progressive(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """What patches get of those of the one region that suits theirs best."""
        best = self.suits(q, k).argmax(-1)[..., None, None]  # [b h regions 1 1]
        k, v = (x.take_along_dim(best, 2) for x in (k, v))
        return (q @ k.mT * call.scale).softmax(-1) @ v

    def suits(self, q: Tensor, k: Tensor) -> Tensor:
        """How well each region of keys suits each of queries, place by place `[b h regions regions]`."""
        return q.flatten(3) @ k.flatten(3).mT

    def _regions(self, call: Call) -> tuple[Tensor, Tensor]:
        """Which queries and which keys are patches, region by region `[regions patches]`."""
        require_divides(self, "region", call)
        (rows, cols), r = sides(call), self.region
        asking, seen = (
            tokens.view(rows // r, r, cols // r, r).transpose(1, 2).reshape(-1, r * r)
            for tokens in (patch_tokens(self, call), patch_keys(self, call))
        )
        return asking, seen


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for region in (1, 2, 4):
        with attach(model, StyA2K(region)) as run:
            print(region, run.difference(**inputs))
