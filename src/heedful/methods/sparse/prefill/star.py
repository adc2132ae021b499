"""Two cuts: the patches that others look at most in an encoder, and later, of these, those that text looks at most."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Mask
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveShare
from heedful.kit.picked import PickedPatches, best, weights_of
from heedful.kit.topk import top_k


class STAR(PickedPatches):
    """Shows a language model the patches that draw most attention, and its later layers fewer, chosen by the question.

    The first cut takes away what the image itself says little of, the second what nobody asked for.
    """

    paper = Paper(
        "P118",
        "STAR: Stage-Wise Attention-Guided Token Reduction for Efficient Large Vision-Language Models Inference",
        "Yichen Guo, Hanze Li, Zonghao Zhang, Jinhao You, Kai Tang, Xiande Huang",
        2025,
        "2505.12359",
        "",
        differs=(
            "The authors' text was at hand in parts: both scores are theirs, a mean over patches and one over text; "
            "the shares and the layer of the second cut are ours.",
            "A patch that goes is seen by nobody from then on and keeps its place, so that attention alone is cheaper; "
            "the authors take it out.",
            "For the second cut all text of the prompt counts, and nothing that is written later.",
        ),
    )
    share: PositiveShare = 0.5  # of the patches that the language model sees, rounded up
    # of the language model's layers, the last that sees them all
    late: NonNegativeInt = 16
    late_share: PositiveShare = 0.25  # of these patches that its later layers see, rounded up

    @classmethod
    def neutral(cls) -> STAR:
        return cls(share=1.0, late_share=1.0)

    def idle(self, call: Call) -> bool:
        return self.share == self.late_share == 1.0 or call.cross or call.layer < self.layer

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where = self.patches(call)
        received = torch.einsum("bhqk->bk", weights[:, :, where, where])  # the mean, but for a factor
        return best(received, ceil(self.share * received.shape[1]))

    def later(self, kept: Tensor, mask: Mask, call: Call) -> Tensor:
        if call.layer - call.lowest != self.late:
            return kept
        weights = weights_of(mask, call, slice(0, len(call.queries)))
        asks = (call.is_text & ~call.marked_queries("image")[:, :1])[:, 0].to(weights)
        given = torch.einsum("bhqk,bq->bk", weights, asks.expand(len(weights), -1))
        number = call.numbers("image")[:, 0].expand(given.shape)
        among = torch.zeros(kept.shape, dtype=given.dtype, device=given.device)
        among = among.scatter_add(1, number.clamp(min=0), given.masked_fill(number < 0, 0.0))
        return top_k(among, ceil(self.late_share * int(kept[0].sum())), kept)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(model, length=22)
    roles = {"patches": ((1, 17),), "image": ((1, 17),)}
    for late_share in (1.0, 0.25):
        with attach(model, STAR(layer=1, late=0, late_share=late_share), roles=roles) as run:
            print(late_share, run.difference(**inputs))
