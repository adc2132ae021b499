"""Linear attention with weights (1 + 1/z) s - z/n: s = phi(q).phi(k) scale / n, z their sum; rows sum to one."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, Paper, PositiveInt, Site, at
from heedful.kit.running import CHUNK, Running, wide


def features(x: Tensor) -> Tensor:
    """ELU + 1, without losing what lies far below zero to rounding."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


class MALA(Method):
    """Magnitude-aware linear attention: longer queries look more sharply. For models trained with it."""

    paper = Paper(
        "P017",
        "Rectifying Magnitude Neglect in Linear Attention",
        "Qihang Fan, Huaibo Huang, Yuang Ai, Ran He",
        2025,
        "2507.00698",
        "ICCV 2025",
        differs=(
            "The similarity holds the authors' code's factor scale / n, which their formula lacks; it matters, because "
            "the weights depend on the similarity's size.",
            "Causal models sum over the keys so far, n being their number; the authors' model sees all tokens.",
            "Queries and keys come with the model's rotary embedding in them; the authors rotate after the features, "
            "and leave the rotation out of z, so that their rows do not quite sum to one. Here weights depend on "
            "places, not on distances alone: texts padded on the left need position_ids, as `generate` gives them.",
            "The authors' depthwise convolution of the values and gate of the output are not part of it.",
        ),
    )
    chunk: PositiveInt = CHUNK  # query rows a step; speed and memory only

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k, self.chunk)
        phi, v = running.hide(features(running.cut(k))), running.cut(v)
        values = torch.cat([v, running.ones(v)], -1)  # a 1 beside each value sums phi(k) as well
        mixed = running.mixed("products", features(q) * call.scale, phi, values)
        return _rectified(mixed, call.spread(running.sums("values", values)))


def _rectified(mixed: Tensor, mean: Tensor) -> Tensor:
    """(1 + 1/z) sum s v - z mean v, from sums over keys whose last column holds what ones in place of v give."""
    (top, s), (v, n) = (torch.split(x, [x.shape[-1] - 1, 1], -1) for x in (mixed, mean))
    s, n = torch.where(s > 0, s, 1.0), torch.where(n > 0, n, 1.0)  # rows without a key have zeros everywhere else
    return top / s + (top - s * v / n) / n


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, MALA()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
