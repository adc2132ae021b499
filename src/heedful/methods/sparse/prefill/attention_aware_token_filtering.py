"""r_t = share of images in which patch t draws more than the mean in layer 1; patches of low r_t are seen by nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.mask import Dense, Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.sites import Site, at
from heedful.core.stats import Mean, Statistic
from heedful.core.summary import Summary, sums
from heedful.kit.batches import at_least_one, read
from heedful.kit.seeds import seed_of


class AttentionAwareTokenFiltering(Method):
    """A vision model sees the patches that always draw attention early on, and those where a detector found things.

    `fit(method, model, batches)` learns from images which places these are. What a detector finds in each image is the
    role `object`: spans of tokens.
    """

    paper = Paper(
        "P176",
        "Speed-up of Vision Transformer Models by Attention-aware Token Filtering",
        "Takahiro Naruko, Hiroaki Akutsu",
        2025,
        "2506.01519",
        "",
        differs=(
            "The authors' full text was not at hand: the attention rate is what a summary of it tells, and how many "
            "places are kept is ours.",
            "A filtered patch is seen by no token in any layer, so that what is kept is as if it had been taken out "
            "before the encoder; its own row is computed still, and only attention becomes cheaper.",
            "Of patches with one rate those that draw more attention on average come first.",
            "No detector comes along; tokens before the patches always stay.",
        ),
    )
    subjects = ("image",)
    # of the patches that stay by their place; 2.8 times fewer tokens, the paper's gain in speed
    share: PositiveShare = 0.35
    rates: Fitted | None = None  # rate and mean, [patches], from a fit
    seed: int | None = None  # without a fit: random rates

    @classmethod
    def neutral(cls) -> AttentionAwareTokenFiltering:
        return cls(1.0)

    @classmethod
    def example(cls) -> AttentionAwareTokenFiltering:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return call.cross or self.share == 1.0

    @at(Site.MASK)
    def filter(self, mask: Mask, call: Call) -> Mask:
        ((start, stop),) = call.region("patches")
        chosen = self._order(stop - start)[: ceil(self.share * (stop - start))]
        k = call.k_pos[:, 0]  # [b|1 k]
        stays = (k < start) | (k >= stop) | torch.isin(k, (start + chosen).to(k.device))
        if "object" in call.roles:
            stays = stays | call.marked("object")[:, 0]
        return mask & Dense(stays[:, None, None])

    def _order(self, patches: int) -> Tensor:
        """The patches, those that stay longest first."""
        if self.rates is None:
            return torch.randperm(patches, generator=torch.Generator().manual_seed(seed_of(self, "rates")))
        rate, mean = self.rates["rate"], self.rates["mean"]
        if len(rate) != patches:
            rule = f"were fitted to images of {len(rate)} patches, and this one has {patches}"
            raise FieldError(self, "rates", self.rates, rule, "a fit to images of this size")
        order = mean.argsort(descending=True)
        return order[rate[order].argsort(descending=True, stable=True)]

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AttentionAwareTokenFiltering:
        """How often each patch draws more than the mean in the first layer, over all images."""
        (found,) = read(context, _Drawn(), at_least_one(self, batches, {"pixel_values": "..."})).values()
        rate, mean = found.value.float()
        return replace(self, rates=Fitted({"rate": rate, "mean": mean}))


class _Drawn(Method):
    """Whether each patch draws more than the mean of its image, and which share of what all patches draw, `[2 n]`."""

    def idle(self, call: Call) -> bool:
        return call.cross or call.layer > 0

    @sums("received")
    def count(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.received is None:
            return None
        ((start, stop),) = call.region("patches")
        drawn = pattern.received.mean(1)[:, start:stop]  # [b n]: each image's tokens, the mean over heads
        drawn = drawn / drawn.sum(-1, keepdim=True)
        high = (drawn > drawn.mean(-1, keepdim=True)).to(drawn.dtype)
        return Mean.of(torch.stack([high, drawn]).sum(1), float(len(drawn)))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, fit(AttentionAwareTokenFiltering(), model, [inputs])) as run:
        print(run.difference(**inputs))
