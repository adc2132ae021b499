"""Each patch sees the k x k patches nearest to it, none fewer at a border: softmax(s_ij + B[j - i]) over them."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from heedful.authoring import Call, Layer, Mask, Method, OddInt, Paper, PositiveInt, Site, adds, at
from heedful.methods.mechanisms.local._neighbours import Lines, require_room, within


class NeighborhoodAttention(Method):
    """A window that moves with the query patch by patch, and a learned bias for each offset. For models trained so."""

    paper = Paper(
        "P184",
        "Neighborhood Attention Transformer",
        "Ali Hassani, Steven Walton, Jiachen Li, Shen Li, Humphrey Shi",
        2023,
        "2204.07143",
        "CVPR 2023",
        differs=(
            "It is the attention alone, in any vision transformer: the authors' pyramid of convolutions and stages is "
            "not here.",
            "Tokens outside the grid of patches, as a class token, see everything and are seen by all, without a bias; "
            "the authors' models have none.",
            "A grid with a side below `size * dilation` patches is refused; the authors pad it with zeros.",
            "`dilation` is that of the authors' DiNAT (2209.15001), where patches see every `dilation`-th one.",
            "First biases come from a generator seeded by the layer's number and do not touch the global one.",
        ),
    )
    subjects = ("image",)
    every_token = True
    anywhere = True
    size: Annotated[OddInt, Ge(3)] = 7  # patches along a side of the neighbourhood; the paper: 7
    dilation: PositiveInt = 1  # patches from one neighbour to the next; NAT: 1

    @classmethod
    def example(cls) -> NeighborhoodAttention:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        table = torch.empty(layer.heads, 2 * self.size - 1, 2 * self.size - 1)
        return {"bias": torch.nn.init.trunc_normal_(table, std=0.02, generator=random)}

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        size, dilation = (self.size,) * 2, (self.dilation,) * 2
        require_room(self, self.size, call, size, dilation, 3)
        return within(mask, call, size, (1, 1), dilation)

    @adds
    def lean(self, call: Call) -> Tensor:
        return Lines(call).by_offset(call.params["bias"], self.dilation)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=28)
    inputs = models.tiny_inputs(model)
    with attach(model, NeighborhoodAttention(3)) as run:
        print(run.difference(**inputs))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
