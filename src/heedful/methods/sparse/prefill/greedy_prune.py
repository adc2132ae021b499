"""Patch by patch the one of the greatest cos(x_i, x_last), of those with cos(x_i, x_j) <= tau for all j kept so far."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, cast

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.mask import Dense, Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveShare
from heedful.core.sites import Site, at
from heedful.kit.picked import KEPT, seen
from heedful.kit.running import wide


class GreedyPrune(Method):
    """Leaves later layers patches that are like the question and unlike each other, chosen one after another.

    Where an image stands in a language model's prompt is the role `image`. With `role="patches"` an encoder chooses
    among its own, and its class token stands for the question.
    """

    paper = Paper(
        "P210",
        "GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models",
        "Ruiguang Pei, Weiqing Sun, Zhihui Fu, Jun Wang",
        2025,
        "2506.13166",
        "arXiv",
        differs=(
            "Only the abstract and others' accounts could be read: by these the most salient patch is kept, all that "
            "are more alike to it than a threshold are struck out, and so on, and salient is what is like the last "
            "token of the text. The layer and the threshold are ours.",
            "Tokens are compared as the input of the layer's attention, behind its norm.",
            "Where all are kept or struck out before there are enough, the most salient of those struck out fill up.",
            "A patch that goes is seen by nobody behind the layer, and keeps its place.",
            "A prompt of which the image came in an earlier call keeps all of it.",
        ),
    )
    subjects = ("image",)
    every_token = True
    causal = False  # the whole prompt is looked at before patches go
    chunk_invariant = False
    # of the language model, behind which patches go
    layer: NonNegativeInt = 2
    share: PositiveShare = 0.25  # of the patches that stay, rounded up
    # cosine with a patch that was kept above which another is struck out; 1: the most salient stay
    alike: Annotated[float, Interval(ge=-1, le=1)] = 0.9
    role: Literal["image", "patches"] = "image"  # the patches; "patches": an encoder's own

    @classmethod
    def neutral(cls) -> GreedyPrune:
        return cls(share=1.0)

    @classmethod
    def example(cls) -> GreedyPrune:
        return cls(layer=0, alike=0.5, role="patches")

    def idle(self, call: Call) -> bool:
        elsewhere = self.role == "image" and not call.mask.causal  # in the encoder that comes before
        return self.share == 1.0 or call.cross or elsewhere or call.layer - call.lowest < self.layer

    @at(Site.MASK)
    def pick(self, mask: Mask, call: Call) -> Mask:
        name = f"{KEPT}, {call.lowest}"
        forward, cache = call.state.forward, call.state.cache
        if call.layer - call.lowest == self.layer:
            number = call.numbers(self.role)[:, 0]  # [b|1 n]
            there = (number >= 0).sum(1)  # [b|1]
            whole = bool((there == there.new_tensor([x.tokens for x in call.regions(self.role)])).all())
            if len(call.queries) == len(call.keys) and whole and bool(there.any()):  # else patches are yet to come
                forward[name] = self._kept(number, call)
            return mask
        kept = forward.get(name, cache.get(name))
        if kept is None:
            return mask
        cache[name] = kept  # what is decoded later sees no more
        return mask & Dense(seen(kept, call, self.role))

    def _kept(self, number: Tensor, call: Call) -> Tensor:
        """Which patches stay `[b p]`, by which of them each token is `[b|1 n]`, from 0 up, and -1 elsewhere."""
        (tokens,) = wide(cast(Tensor, call.hidden))
        tokens = normalize(tokens, dim=-1)
        b, n, e = tokens.shape
        asks = ((number < 0) & call.is_text[:, 0]).expand(b, -1)
        if not bool(asks.any(1).all()):
            rule = f"{self.role} must leave each text a token that asks: a class token, or the last of a question"
            raise FieldError("attach()", "roles", tuple(call.region(self.role)), rule, {self.role: ((1, 257),)})
        place = torch.arange(n, device=tokens.device)
        of_class = self.role == "patches"  # the first, before registers
        at = place.where(asks, n).amin(1) if of_class else place.where(asks, -1).amax(1)
        asked, order = tokens.gather(1, at[:, None, None].expand(-1, 1, e))[:, 0], number.expand(b, -1).argsort(1)
        counts = (number >= 0).sum(1).expand(b).tolist()
        groups = [slice(0, b)] if len(set(counts)) == 1 else [slice(i, i + 1) for i in range(b)]
        kept: list[Tensor] = []
        for rows in groups:
            patches = order[rows, n - counts[rows.start] :, None].expand(-1, -1, e)  # what is none comes before them
            kept += self.choose(tokens[rows].gather(1, patches), asked[rows])
        return pad_sequence(kept, batch_first=True)

    def choose(self, patches: Tensor, asked: Tensor) -> Tensor:
        """Which patches `[b p e]` stay `[b p]`, by the question's last token `[b e]`; all have length 1."""
        salient = torch.einsum("bpe,be->bp", patches, asked)
        return greedy(salient, patches, ceil(self.share * patches.shape[1]), self.alike)


def greedy(salient: Tensor, patches: Tensor, count: int, alike: float) -> Tensor:
    """Which patches are kept `[b p]`, by how salient they are `[b p]` and what they are `[b p e]`, of length 1."""
    kept = torch.zeros_like(salient, dtype=torch.bool)
    struck = kept
    for _ in range(count):
        free = ~(kept | struck)
        free = free | (~free.any(-1, keepdim=True) & ~kept)
        chosen = salient.masked_fill(~free, -torch.inf).argmax(-1, keepdim=True)
        kept = kept.scatter(1, chosen, True)
        mine = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))
        struck = struck | (((patches @ mine.mT)[..., 0] > alike) & (alike < 1))  # not for a rounding
    return kept


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for alike in (1.0, 0.5):
        with attach(model, GreedyPrune(layer=0, alike=alike, role="patches")) as run:
            print(alike, run.difference(**inputs))
