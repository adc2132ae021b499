"""Each block of b x b patches sees itself and h patches around it: softmax(scale q_i (k_j + r_rows + r_cols))."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    Layer,
    Mask,
    Method,
    NonNegativeInt,
    Paper,
    PositiveInt,
    Site,
    SiteError,
    adds,
    at,
)
from heedful.core.flags import between
from heedful.kit.patches import grid_of
from heedful.kit.running import wide
from heedful.methods.mechanisms.local._neighbours import Lines, narrowed


class HaloAttention(Method):
    """One window for a whole block, wider than it by a halo, and learned keys for offsets. For models trained so."""

    paper = Paper(
        "P182",
        "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "Ashish Vaswani, Prajit Ramachandran, Aravind Srinivas, Niki Parmar, Blake Hechtman, Jonathon Shlens",
        2021,
        "2103.12731",
        "CVPR 2021",
        differs=(
            "It is the attention alone, in any vision transformer: queries with a stride, which make an image smaller, "
            "and the authors' stages of convolutions are not here.",
            "A halo ends at the image's border; the authors pad the image with zeros, which are keys like others.",
            "Tokens outside the grid of patches, as a class token, see everything and are seen by all, without an "
            "offset; the authors' models have none.",
            "The last blocks are smaller where blocks do not divide the grid; theirs do.",
            "Keys of offsets are as in the published code of one of the authors, for another paper of his: one table "
            "for rows and one for columns, as wide as a head, the same for all heads, added up. First ones come from a "
            "generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    anywhere = True
    block: PositiveInt = 8  # patches along a side of a block; the paper: 8
    halo: NonNegativeInt = 3  # patches around it that are seen too; the paper: 3

    @classmethod
    def example(cls) -> HaloAttention:
        return cls(2, 1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, d = torch.Generator().manual_seed(layer.number), layer.head_dim
        shape = 2 * self._farthest + 1, d
        return {name: torch.randn(shape, generator=random) * d**-0.5 for name in ("rows", "columns")}

    @property
    def _farthest(self) -> int:
        return self.block - 1 + self.halo

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        if len(grid := grid_of(call)) != 2:
            raise SiteError(f"{self!r}, layer {call.layer}: blocks are of rows and columns, and patches lie on {grid}")

        def sees(axis: int, query: Tensor, key: Tensor) -> Tensor:
            start = query // self.block * self.block - self.halo
            return between(key, start, start + self.block + 2 * self.halo)

        return narrowed(mask, call, sees)

    @adds
    def lean(self, call: Call) -> Tensor:
        if call.query is None:
            raise SiteError(f"{self!r}, layer {call.layer}: offsets are for queries, and it is handed none")
        lines, far = Lines(call), self._farthest
        asked = wide(call.query[:, :, call.rows])[0] * call.scale
        found = []
        for axis, (name, keys) in enumerate((("rows", lines.rows), ("columns", lines.columns))):
            by_offset = asked @ call.params[name].to(asked.dtype).mT  # [b h r offsets]
            offset = (keys[:, None] - lines.query[..., axis, None] + far).clamp(0, 2 * far)  # [b|1 r lines|width]
            found.append(by_offset.gather(-1, offset[:, None].expand(*asked.shape[:3], -1)))
        down, right = found
        return lines.laid(down[..., None] + right[..., None, :])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for halo in (0, 1, 2):
        with attach(model, HaloAttention(2, halo)) as run:
            print(halo, run.difference(**inputs))
