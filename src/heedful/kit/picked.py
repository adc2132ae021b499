"""Some of an image's tokens, chosen by what a layer of the encoder attends to: nobody sees the others afterwards."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self, cast

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Dense, Mask
from heedful.core.method import Method
from heedful.core.ranges import NonNegativeInt, PositiveShare
from heedful.core.sites import Site, at
from heedful.kit.scores import scores_of
from heedful.kit.seen import softmax_over
from heedful.kit.topk import top_k

KEPT = "kept"


class PickedPatches(Method, abstract=True):
    """Chooses in one layer of an encoder which patches its later layers, and a language model behind it, may see.

    Where patches stand in the encoder is the role `patches`, which a vision model's own run names by itself; where
    they stand in the language model's prompt is the role `image`. Both have the patches in the same order.
    """

    subjects = ("image",)
    every_token = True
    causal = False  # the whole image is looked at before it is chosen from
    chunk_invariant = False
    layer: NonNegativeInt = 22  # of the encoder, where patches are chosen; LLaVA's: the last but one of 24
    share: PositiveShare = 0.25  # of the patches that stay, rounded up

    @classmethod
    def neutral(cls) -> Self:
        return cls(share=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(layer=0)

    @abstractmethod
    def choose(self, weights: Tensor, call: Call) -> Tensor:
        """Which patches stay `[b p]`, of an encoder's weights `[b h q k]`."""

    def later(self, kept: Tensor, mask: Mask, call: Call) -> Tensor:
        """Which of the kept `[b p]` stay behind a layer of the language model, which sees all of them."""
        return kept

    def idle(self, call: Call) -> bool:
        return self.share == 1.0 or call.cross or call.layer < self.layer

    @at(Site.MASK)
    def pick(self, mask: Mask, call: Call) -> Mask:
        forward, cache = call.state.forward, call.state.cache
        if call.layer == self.layer:
            if self.patches(call).stop <= len(call.queries):
                forward[KEPT] = self.choose(weights_of(mask, call, slice(0, len(call.queries))), call)
            return mask
        kept = forward.get(KEPT, cache.get(KEPT))
        if kept is None:
            return mask
        reads_on = call.lowest > self.layer
        narrowed = mask & Dense(seen(kept, call, "image" if reads_on else "patches"))
        if reads_on:
            cache[KEPT] = kept  # what is decoded later has no encoder before it
            if KEPT in forward:
                forward[KEPT] = self.later(kept, narrowed, call)
        return narrowed

    def patches(self, call: Call) -> slice:
        """Where the patches stand among the encoder's tokens."""
        spans = call.region("patches")
        if len(spans) != 1:
            raise FieldError("attach()", "roles", tuple(spans), "patches must be one span", {"patches": ((1, 257),)})
        return slice(*spans[0])


def seen(kept: Tensor, call: Call, role: str) -> Tensor:
    """Which keys may be seen, `[b h|1 1 k]`: all but the role's tokens that are not kept `[b p]`."""
    number = call.numbers(role)
    if int(number.max()) >= kept.shape[1]:
        rule = f"must hold the {kept.shape[1]} patches of the encoder"
        raise FieldError("attach()", "roles", {role: int(number.max()) + 1}, rule, {role: ((1, 1 + kept.shape[1]),)})
    number = number.expand(len(kept), -1, -1)
    stays = (number < 0) | kept[:, None].expand(-1, number.shape[1], -1).gather(2, number.clamp(min=0))
    return (stays if stays.shape[1] == 1 else call.spread(stays))[:, :, None]


def weights_of(mask: Mask, call: Call, rows: slice) -> Tensor:
    """The weights of some of the call's queries, `[b h r k]`, by softmax over what they may see."""
    query, key = cast(Tensor, call.query), cast(Tensor, call.key)
    scores = scores_of(query[:, :, rows], key, call, rows)
    keep = mask.keeps(call.tile(rows, slice(0, len(call.keys))).pairs)
    return softmax_over(scores, keep)


def best(score: Tensor, count: int | Tensor) -> Tensor:
    """True at the `count` (one number, or `[b 1]`) highest of each row `[b p]`; the earlier of equals goes first."""
    return top_k(score, count, torch.ones_like(score, dtype=torch.bool))
