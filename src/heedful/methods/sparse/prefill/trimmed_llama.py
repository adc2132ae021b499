"""The union over heads of the top k of an image's features in the first cross-attention: later layers see no others."""

from __future__ import annotations

import torch

from heedful.core.call import Call
from heedful.core.mask import Dense, Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.sites import Site, at
from heedful.kit.picked import KEPT, weights_of
from heedful.kit.topk import top_k


class TrimmedLlama(Method):
    """Where keys come from another sequence, such as an image: those stay that some head wants in the first layer.

    A head wants the features to which the prompt's tokens together give the most weight.
    """

    paper = Paper(
        "P221",
        "Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features",
        "Jewon Lee, Ki-Ung Song, Seungmin Yang, Donguk Lim, Jaeyeon Kim, Wooksu Shin, Bo-Kyeong Kim, Yong Jae Lee, "
        "Tae-Ho Kim",
        2025,
        "2504.00557",
        "CVPR 2025 workshop on efficient large vision models",
        differs=(
            "The authors' code was not at hand; that weights are added up over the prompt's tokens is how their first "
            "pages and a review have it.",
            "Features that go are masked in later layers and stay in their caches, so that only attention is cheaper.",
            "The first cross-attention sees everything while it decodes too.",
            "Any encoder's features will do, such as sound's.",
        ),
    )
    subjects = ("encoder-decoder", "cross")
    causal = False  # the whole prompt is looked at before anything goes
    chunk_invariant = False
    share: PositiveShare = 0.25  # of the features that each head wants, rounded up; the authors' for the 11B model

    @classmethod
    def neutral(cls) -> TrimmedLlama:
        return cls(share=1.0)

    @classmethod
    def example(cls) -> TrimmedLlama:
        return cls(share=0.05)

    def idle(self, call: Call) -> bool:
        return not call.cross or self.share == 1.0

    @at(Site.MASK)
    def trim(self, mask: Mask, call: Call) -> Mask:
        forward, cache = call.state.forward, call.state.cache
        first = KEPT not in forward
        if KEPT in cache:  # what a prompt wanted holds for all that is decoded
            forward[KEPT] = cache[KEPT]
        elif first:
            weights = weights_of(mask, call, slice(0, len(call.queries)))
            given = (weights * call.is_text[..., None]).sum(2)
            keep = mask.keeps(call.pairs)
            there = torch.ones_like(given, dtype=torch.bool) if keep is None else keep.any(2).expand_as(given)
            wanted = (self.share * there.sum(-1, keepdim=True).double()).ceil()
            forward[KEPT] = top_k(given, wanted, there).any(1)
        cache[KEPT] = forward[KEPT]
        return mask if first else mask & Dense(forward[KEPT][:, None, None])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    inputs = models.tiny_inputs(model)
    with attach(model, TrimmedLlama(share=0.1)) as run:
        print(run.difference(**inputs))
