"""cls + mean of f(Q^l K^T V): the R patches most mixed into the class token, by rollout, ask all tokens once more."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from heedful.authoring import Call, Layer, Method, Paper, PositiveShare, Site, at, reads
from heedful.kit.feature_maps import with_bias
from heedful.kit.patches import patch_tokens, whole_image
from heedful.methods.mechanisms.pooling._attending import attended, attending, norm, normed, through


class GlobalLocalCrossAttention(Method):
    """GLCA: what an image's foremost patches find is added to its class token. For models trained with it.

    It reads the maps of an encoder's every layer and stands behind the last. Where a model also reads a text,
    `attach(..., only=...)` spares that one's last layer parameters that it does not use.
    """

    paper = Paper(
        "P268",
        "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
        "Haowei Zhu, Wenjing Ke, Dong Li, Ji Liu, Lu Tian, Yi Shan",
        2022,
        "2205.02151",
        "CVPR 2022",
        differs=(
            "The local half; the other is PairwiseCrossAttention.",
            "The mean of what the chosen patches come to is added to the class token, for one classifier; the paper "
            "has one for each of the two and adds up what they say, and does not tell what theirs reads, but for a "
            "class token where persons are known again.",
            "Patches alone are ranked, and the class token does not ask; it is a key like others. The paper ranks it "
            "among them.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    whole_map = True
    share: PositiveShare = 0.1  # of the patches that ask; the paper: 0.1, and 0.3 to know persons and cars again

    @classmethod
    def example(cls) -> GlobalLocalCrossAttention:
        return cls(0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if not layer.ends_list:
            return {}
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        found = norm("first", e) | attending(random, "look", e) | norm("second", e)
        return found | with_bias(random, "up", 4 * e, e) | with_bias(random, "down", e, 4 * e)

    def idle(self, call: Call) -> bool:
        return "cls" not in call.roles or not whole_image(call)

    @reads(Site.PATTERN)
    def roll(self, weights: Tensor, call: Call) -> None:
        mean = weights.detach().mean(1)  # [b n n]
        own = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        before = call.state.forward.get(f"rolled {call.below}", own)
        call.state.forward[f"rolled {call.layer}"] = (0.5 * mean + 0.5 * own) @ before

    @at(Site.RESIDUAL)
    def add(self, stream: Tensor, call: Call) -> Tensor:
        if not call.ends_list:
            return stream
        p = {name: x.to(stream) for name, x in call.params.items()}
        cls = call.marked_queries("cls")[0, 0]
        patches = patch_tokens(self, call)
        rank = call.state.forward[f"rolled {call.layer}"][:, cls][:, 0, patches]
        chosen = patches[self._best(rank, math.ceil(self.share * len(patches)))]  # [b R]
        asking = stream.take_along_dim(chosen[..., None], 1)
        seen = normed(p, "first", stream)
        found = asking + attended(p, "look", seen.take_along_dim(chosen[..., None], 1), seen, call.heads)
        found = found + through(p, "down", gelu(through(p, "up", normed(p, "second", found))))
        return stream + cls[:, None] * found.mean(1, keepdim=True)

    def _best(self, rank: Tensor, count: int) -> Tensor:
        return rank.topk(count).indices


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=16)
    with attach(model, GlobalLocalCrossAttention(0.25)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
