"""Every token sees each window of an image by one key and value, k = W_k LN(conv(x)), and no patch by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm

from heedful.authoring import Call, Layer, Mask, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.kit.chosen import Shown
from heedful.kit.patches import patch_tokens, require_divides, sides, whole_image


class GlobalSubsampledAttention(Method):
    """One of Twins' two attentions; the other is that of windows side by side. For models trained with it.

    Windows side by side are `GeneralizedNeighborhoodAttention((w, w), (w, w))`; Twins has them in every second layer.
    """

    paper = Paper(
        "P185",
        "Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
        "Xiangxiang Chu, Zhi Tian, Yuqing Wang, Bo Zhang, Haibing Ren, Xiaolin Wei, Huaxia Xia, Chunhua Shen",
        2021,
        "2104.13840",
        "NeurIPS 2021",
        differs=(
            "It is the global one of the two attentions alone, in any vision transformer: the authors' pyramid and "
            "their convolution for positions are not here.",
            "Summaries have projections of their own; the model's, where the authors have none, serve other tokens.",
            "Tokens outside the grid of patches, as a class token, are seen by themselves and see what patches see; "
            "the authors' Twins-SVT has none.",
            "Summaries are not rotated, in models that rotate queries and keys; the authors' do not.",
            "In causal models, and where the patches are no grid or not all are read at once, softmax stays.",
            "Weights are drawn as torch.nn.Conv2d and Linear draw them, by a generator seeded by the layer's number; "
            "the authors draw normal ones.",
        ),
    )
    subjects = ("image",)
    stride: PositiveInt = 2  # patches along a side of a window that is summed up; Twins: 8, 4, 2 and 1, by stage

    @classmethod
    def neutral(cls) -> GlobalSubsampledAttention:
        return cls(1)

    @classmethod
    def example(cls) -> GlobalSubsampledAttention:
        return cls(2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e, s = torch.Generator().manual_seed(layer.number), layer.width, self.stride
        if s == 1:
            return {}

        def drawn(*shape: int, fan: int = e) -> Tensor:
            return (torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(fan)

        g, d, dv = layer.kv_heads, layer.head_dim, layer.value_dim
        return {
            "reduce": drawn(e, e, s, s, fan=e * s * s), "reduce_bias": drawn(e, fan=e * s * s),
            "norm": torch.ones(e), "norm_bias": torch.zeros(e),
            "key": drawn(g, d, e), "key_bias": drawn(g, d), "value": drawn(g, dv, e), "value_bias": drawn(g, dv),
        }  # fmt: skip

    def idle(self, call: Call) -> bool:
        return self.stride == 1 or not whole_image(call)

    @at(Site.KEY)
    def sum_up_keys(self, key: Tensor, call: Call) -> Tensor:
        return self._summed_up("key", key, call)

    @at(Site.VALUE)
    def sum_up_values(self, value: Tensor, call: Call) -> Tensor:
        return self._summed_up("value", value, call)

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        hidden = patch_tokens(self, call)[self._windows(call) :]
        seen = torch.ones(len(call.keys), dtype=torch.bool, device=hidden.device).index_fill(0, hidden, False)
        return mask & Shown(seen[None, None])

    def _windows(self, call: Call) -> int:
        require_divides(self, "stride", call)
        return math.prod(sides(call)) // self.stride**2

    def _summed_up(self, name: str, x: Tensor, call: Call) -> Tensor:
        """Keys or values `[b g n d]`, those of the first patches being of the windows now, row by row."""
        if call.hidden is None:
            raise SiteError(f"{self!r}, layer {call.layer}: sums up the block's input, and it is handed none")
        tokens, windows = patch_tokens(self, call), self._windows(call)
        p = {name: x.to(call.hidden) for name, x in call.params.items()}
        image = call.hidden[:, tokens].mT.unflatten(-1, sides(call))
        inner = conv2d(image, p["reduce"], p["reduce_bias"], stride=self.stride).flatten(2).mT  # [b windows e]
        inner = layer_norm(inner, inner.shape[-1:], p["norm"], p["norm_bias"])
        made = inner[:, None] @ p[name].mT + p[f"{name}_bias"][:, None]
        return x.index_copy(2, tokens[:windows], made.to(x.dtype))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for stride in (1, 2, 4):
        with attach(model, GlobalSubsampledAttention(stride)) as run:
            print(stride, run.difference(**inputs))
