"""x <- x - rate dL/dx, L = 1 - mean of the highest fifth of a word's map in its box + that of those outside."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveShare, RoleName
from heedful.methods.intervene.diffusion._map_loss import Guidance


class ReAtCo(Guidance):
    """Moves what a diffusion model denoises so that a thing comes to stand in its box.

    Two roles say what and where, words among the keys and places among the queries, counted row by row:
    `roles={"thing": ((0, 2),), "box": ((0, 4), (8, 12))}`. Things with boxes of their own are joined:
    `ReAtCo(role="cat", box="left") | ReAtCo(role="dog", box="right")`.
    """

    paper = Paper(
        "P279",
        "Re-Attentional Controllable Video Diffusion Editing",
        "Yuanzhi Wang, Yong Li, Mengyi Liu, Xiaoya Zhang, Xin Liu, Zhen Cui, Antoni B. Chan",
        2024,
        "2412.11710",
        "AAAI 2025",
        differs=(
            "For pictures: over a video's frames the authors smooth maps too, and average the two parts of the loss.",
            "Invariant regions, where the source is put back before each step, are the caller's to keep.",
            "Moving on within a step until a threshold is met is left to the caller: call run and moved again.",
            "A box or its outside of less than five places counts its highest one.",
        ),
    )
    role: RoleName = "thing"  # the words whose maps go into the box, each for itself
    box: RoleName = "box"  # the places that it is
    text: str = ""  # the words that share the places; "": all; the authors: without the first and the last token
    sharpness: PositiveFloat = 100.0  # of that sharing; the authors: 100
    share: PositiveShare = 0.2  # of the places of the box, and of those outside, that count; the authors: 0.2

    @classmethod
    def example(cls) -> ReAtCo:
        return cls(role="marked", box="answer")

    def loss(self, maps: Tensor, call: Call) -> Tensor:
        text = call.marked(self.text)[:, 0] if self.text else call.k_pos[:, 0] >= 0
        words, is_text = call.marked(self.role)[:, 0] & text, call.is_text[:, 0]
        inside = call.marked_queries(self.box)[:, 0]
        won = self.shared(maps, text, self.sharpness)
        each = 1 - self._highest(won, inside & is_text) + self._highest(won, ~inside & is_text)  # [b k]
        return (each * words).sum()

    def _highest(self, maps: Tensor, places: Tensor) -> Tensor:
        """The mean of each map's highest share of some places `[b|1 n]`, `[b k]`."""
        count = (self.share * places.sum(-1)).long().clamp(min=1)  # [b|1]
        ranked = maps.masked_fill(~places[..., None], 0.0).sort(1, descending=True).values
        counts = torch.arange(maps.shape[1], device=maps.device) < count[:, None]
        return (ranked * counts[..., None]).sum(1) / count[:, None]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 12))
    method = ReAtCo(sharpness=1.0)
    x = model.get_input_embeddings()(ids).detach()  # stands for a noised picture
    with attach(model, method, roles={"thing": ((2, 4),), "box": ((0, 6),)}) as run:
        for i in range(4):
            x.requires_grad_()
            run(input_ids=ids, decoder_inputs_embeds=x)
            print(run.loss().item())
            x = method.moved(x, run.loss(), i, of=8)
