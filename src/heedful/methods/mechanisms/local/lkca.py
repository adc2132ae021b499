"""Weights a_ij = w[place of j - place of i], a kernel over offsets on the grid of patches: values are convolved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.authoring import Call, Layer, Mask, Method, OddInt, Paper, Site, SiteError, at
from heedful.core.flags import between
from heedful.kit.patches import grid_of
from heedful.methods.mechanisms.local._neighbours import Lines, narrowed


class LKCA(Method):
    """One large kernel a head, in place of scores and softmax: no patch is asked what it is. For models trained so."""

    paper = Paper(
        "P154",
        "LKCA: Large Kernel Convolutional Attention",
        "Chenghao Li, Boheng Zeng, Yi Lu, Pengbo Shi, Qingzi Chen, Jirui Liu, Lingyun Zhu",
        2024,
        "2401.05738",
        differs=(
            "Only the abstract could be read, and the authors' code is not to be had: that a kernel is shared by the "
            "channels of a head, and its size, are guesses.",
            "It is the form that the paper calls attention's, a map whose entries are the kernel's; a test holds it "
            "against the convolution. The layer's queries and keys go unused there.",
            "Tokens outside the grid, as a class token, keep the model's own softmax over all tokens, and patches do "
            "not see them.",
            "Kernels are drawn as torch.nn.Conv2d draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    anywhere = True
    size: OddInt = 11  # patches along a side of the kernel

    @classmethod
    def example(cls) -> LKCA:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, shape = torch.Generator().manual_seed(layer.number), (layer.heads, self.size, self.size)
        return {"kernel": (torch.rand(shape, generator=random) * 2 - 1) / self.size}

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        """Without the pairs that a kernel has no weight for."""
        if len(grid_of(call)) != 2:
            rule = f"a kernel has two sides, and the patches lie on a grid of {len(grid_of(call))}"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        reach = self.size // 2
        return narrowed(mask, call, lambda axis, query, key: between(key, query - reach, query + reach + 1))

    @at(Site.NORMALISE)
    def convolve(self, scores: Tensor, call: Call) -> Tensor:
        kernel = pad(call.params["kernel"].to(scores.dtype), (1, 1, 1, 1))  # what lies beyond has a weight of 0
        lines = Lines(call)
        weights, off = lines.by_offset(kernel).expand(scores.shape), lines.query[:, None, :, :1] < 0
        if not (scores.requires_grad or bool(off.any())):  # what has no part in it has a gradient all the same, of 0
            return weights
        return torch.where(off, scores.softmax(-1), weights)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=28)
    inputs = models.tiny_inputs(model)
    with attach(model, LKCA(5)) as run:
        print(run.difference(**inputs))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
