"""softmax(q [K; K'] / sqrt(d)) [V; V'], K' and V' of another image: one that distracts, in training alone."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, Paper, Share, Site, at
from heedful.kit.running import wide


class PairwiseCrossAttention(Method):
    """PWCA: while an image model trains, some images see another image of the batch too. Nothing changes afterwards."""

    paper = Paper(
        "P268",
        "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
        "Haowei Zhu, Wenjing Ke, Dong Li, Ji Liu, Lu Tian, Yi Shan",
        2022,
        "2205.02151",
        "CVPR 2022",
        differs=(
            "The half that is for training; the other is GlobalLocalCrossAttention.",
            "Each image of a batch is read once, some of them with another; the authors read each both ways, and learn "
            "weights for the two losses.",
            "The other image is the one before in the batch, whether it is read with another itself or not.",
            "What the model adds to its scores is left out there, and nothing is dropped. Where there is a mask, "
            "which tells nothing of another image, all are read alone.",
        ),
    )
    subjects = ("image",)
    share: Share = 0.5  # of the images that see another one
    seed: int = 0  # of which ones these are

    @classmethod
    def neutral(cls) -> PairwiseCrossAttention:
        return cls(0.0)

    @classmethod
    def example(cls) -> PairwiseCrossAttention:
        return cls(1.0)

    def idle(self, call: Call) -> bool:
        return not call.training or self.share == 0 or call.cross or bool(call.mask.rules)

    @at(Site.MIX)
    def distract(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        k, v = call.spread(k), call.spread(v)
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + call.forward)  # the same in all layers
        alone = (torch.rand(len(q), generator=draw) >= self.share).to(q.device)
        scores = call.capped(q @ torch.cat([k, k.roll(1, 0)], 2).mT * call.scale)  # [b h n 2n]
        other = torch.arange(scores.shape[-1], device=q.device) >= k.shape[2]
        scores = scores.masked_fill(alone[:, None, None, None] & other, -torch.inf)
        return scores.softmax(-1) @ torch.cat([v, v.roll(1, 0)], 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit").train()
    inputs = models.tiny_inputs(model)
    for share in (0.0, 0.5, 1.0):
        with attach(model, PairwiseCrossAttention(share)) as run:
            print(share, run(**inputs).logits.mean().item())
