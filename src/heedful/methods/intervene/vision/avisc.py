"""Against the image's blind tokens alone: above mean + lambda std of the last row, in layers that look at the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.kinds.decode import Decode
from heedful.core.kinds.tokens import Prompt, Reader
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare, RoleName
from heedful.core.sites import Site, at
from heedful.methods.intervene.vision._against import LITTLE, PROMPT, Against
from heedful.methods.intervene.vision._looks import _Looks, places_of


class _Emptied(Method):
    """Some tokens of a prompt come in as zeros."""

    places: tuple[int, ...]

    @at(Site.EMBEDDING)
    def empty(self, stream: Tensor, call: Call) -> Tensor:
        gone = torch.isin(call.q_pos[:, 0], torch.tensor(self.places, device=stream.device))
        return stream.masked_fill(gone[..., None], 0.0)


class AvisC(Against):
    """Contrasts what a model says with what it says from the image tokens that it stares at, all others emptied.

    These are told once, at the end of the prompt, for all that is decoded. Layers count until together they have the
    share `gamma` of what all layers give to the image.
    """

    paper = Paper(
        "P158",
        "Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision Language Models",
        "Sangmin Woo, Donguk Kim, Jaehyuk Jang, Yubin Choi, Changick Kim",
        2024,
        "2405.17820",
        "Findings of ACL 2025",
        differs=("Any spans may stand for the image.",),
    )
    gamma: PositiveShare = 0.5  # share of the attention to the image that the layers have which are listened to
    deviations: float = 1.0  # lambda: how many standard deviations above the mean a token is blind; the authors: 1
    role: RoleName = "image"  # the spans of the prompt that stand for the image
    emptied: tuple[int, ...] | None = None  # tokens that come in as zeros; None: told by each prompt
    first: int = 0  # the layer before which they are emptied, the language model's first

    @classmethod
    def neutral(cls) -> AvisC:
        return cls(alpha=0.0)

    def ready(self, prompt: Prompt, read: Reader) -> Decode:
        places = places_of(prompt, self.role)
        if self.emptied is not None or self.alpha == 0 or not places:
            return self
        found = cast(dict[int, Tensor], read(prompt, _Looks(len(prompt) - 1, places)))
        dark = ~self.blind(torch.stack(list(found.values())))
        emptied = tuple(place for place, gone in zip(places, dark.tolist(), strict=True) if gone)
        return replace(self, emptied=emptied, first=min(found))

    def blind(self, given: Tensor) -> Tensor:
        """Which tokens are blind `[n]`, by what the last one gives to each in every layer `[layers n]`."""
        heavy = given.sum(1) / given.sum()
        order = heavy.argsort(descending=True, stable=True)
        count = int((heavy[order].cumsum(0) < self.gamma).sum()) + 1
        mean = given[order[:count]].mean(0)
        if len(mean) == 1:
            return torch.ones_like(mean, dtype=torch.bool)  # there is no other token to tell it from
        return mean >= mean.mean() + self.deviations * mean.std()

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        if self.alpha == 0 or not self.emptied:
            return {PROMPT: (prompt, Stack())}
        emptied = Stack((_Emptied(self.emptied).on(layers=self.first),))
        return {PROMPT: (prompt, Stack()), LITTLE: (prompt, emptied)}


if __name__ == "__main__":
    from heedful import decode, models

    model, tokenizer, _ = models.default()
    lines = tokenizer("The code of the apple is red.\nThe code of the river is blue.\n").input_ids
    ids = lines + tokenizer("Question: what is the code of the apple?\nAnswer: the code is").input_ids
    asked = Prompt(tuple(ids), {"image": ((1, len(lines)),)})
    for alpha in (0.0, 1.0):
        print(alpha, tokenizer.decode(decode(model, asked, AvisC(alpha), new_tokens=6)))
