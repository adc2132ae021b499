"""Out = softmax_channels(Q) (softmax_positions(K)^T V): each channel of the keys is one map over the whole text."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, Paper, Site, at
from heedful.kit.running import Running, wide


class EfficientAttention(Method):
    """A global map for each channel of the keys, mixed by each query. For models trained with it."""

    paper = Paper(
        "P117",
        "Efficient Attention: Attention with Linear Complexities",
        "Zhuoran Shen, Mingyuan Zhang, Haiyu Zhao, Shuai Yi, Hongsheng Li",
        2021,
        "1812.01243",
        "WACV 2021",
        differs=(
            "Of the authors' two ways to normalise it has the softmax, which their code has too, and not the division "
            "by n.",
            "Causal models have a softmax over the keys so far; the authors' models see all places. What lies further "
            "below a later key of the same call and channel than numbers reach, 87 in float32, weighs nothing.",
            "Queries and keys come with the model's position embedding in them, where there is one.",
            "Projections and heads are the model's; the authors' are 1 x 1 convolutions with a residual around them, "
            "and the heads of their code are not in the paper.",
        ),
    )
    subjects = ("text", "image")

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k)
        k, v = running.cut(k), running.cut(v)
        top, fade = running.highest("top", k)
        k = running.exp(k - top)
        total = call.spread(running.sums("total", k, fade))
        seen = total > torch.finfo(k.dtype).tiny  # else a map of nothing: keys far below all to come
        return running.mixed("context", q.softmax(-1) / torch.where(seen, total, torch.inf), k, v, fade)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, EfficientAttention()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
