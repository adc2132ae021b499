"""A + shift A at subject and prompt, in the target's rows, times 1 + boost s; s is the eye of a head on the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, NonNegativeFloat, Paper, RoleName, Site, at


class InContextBrush(Method):
    """Brings a subject that stands beside a picture into it, as a prompt tells, without training.

    Roles name the tokens of the picture that is made, of the one that shows the subject, and of the words:
    `{"target": spans, "subject": spans, "prompt": spans}`, all in one sequence. The target's tokens are given more of
    what they take from both others, and heads in which they look at the prompt count more, for every token.
    """

    paper = Paper(
        "P335",
        "In-Context Brush: Zero-shot Customized Subject Insertion with Context-Aware Latent Space Manipulation",
        "Yu Xu, Fan Tang, You Wu, Lin Gao, Oliver Deussen, Hongbin Yan, Jintao Li, Juan Cao, Tong-Yee Lee",
        2025,
        "2505.20271",
        "SIGGRAPH Asia 2025",
        differs=(
            "Read off the authors' code, whose shift is of the part of the output that comes from subject and prompt; "
            "the paper's text could not be had.",
            "It acts alike in all layers it is attached to; the authors shift in those that have weights of their own "
            "for words, and in all others only count heads: `InContextBrush().on(layers=...) | "
            "InContextBrush(shift=0.0).on(layers=...)`.",
            "Cutting the subject out and laying both pictures side by side is left to the caller.",
        ),
    )
    one_text = True
    whole_map = True
    causal = False
    chunk_invariant = False
    shift: NonNegativeFloat = 0.3  # more of what comes from subject and prompt; the authors: 0.3
    # of the head that looks hardest at the prompt; none of that which does least; the authors: 0.2
    boost: NonNegativeFloat = 0.2
    target: RoleName = "target"  # the picture that is made
    subject: RoleName = "subject"  # the picture that shows the subject
    prompt: RoleName = "prompt"  # the words

    @classmethod
    def neutral(cls) -> InContextBrush:
        return cls(0.0, 0.0)

    @classmethod
    def example(cls) -> InContextBrush:
        return cls(1.0, 1.0, "answer", "marked", "bos")

    def idle(self, call: Call) -> bool:
        return self.shift == 0 == self.boost or call.cross

    @at(Site.PATTERN)
    def brush(self, pattern: Tensor, call: Call) -> Tensor:
        target = call.spread(call.marked_queries(self.target))[..., None]
        subject, prompt = (call.spread(call.marked(role))[:, :, None] for role in (self.subject, self.prompt))
        looks = (pattern * (target & prompt)).sum((2, 3), keepdim=True)  # [b h 1 1]
        low, high = looks.amin(1, keepdim=True), looks.amax(1, keepdim=True)
        eye = (looks - low) / (high - low + torch.finfo(looks.dtype).eps)
        shown = (target & (subject | prompt)).to(pattern.dtype)
        return pattern * (1 + self.shift * shown) * (1 + self.boost * eye)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    roles = {"target": ((9, 17),), "subject": ((2, 9),), "prompt": ((0, 2),)}
    with attach(model, InContextBrush(), roles=roles) as run:
        print(run.difference(**models.tiny_inputs(model)))
