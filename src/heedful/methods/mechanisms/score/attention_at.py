"""s + r in training, r = size * g / |g|, g the loss's gradient at a row of scores: attention that no nudge misleads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.authoring import Call, Method, NonNegativeFloat, Paper, Site, at


class AttentionAT(Method):
    """Adversarial training of attention. Outside training it does nothing.

    Hand each batch over twice, and let both losses go back before a step: the first forward of two is plain, and its
    backward pass tells the nudge that the second one trains against.
    """

    paper = Paper(
        "P192",
        "Attention Meets Perturbations: Robust and Interpretable Attention with Adversarial Training",
        "Shunsuke Kitada, Hitoshi Iyatomi",
        2021,
        "2009.12064",
        "IEEE Access 9",
        differs=(
            "The paper's other form, Attention iAT, is not here: where the differences between words' scores have norm "
            "one, as the paper has them, its nudge is this one, which a test shows; the authors' code takes the "
            "negative gradient there.",
            "A row of a head is an attention of its own, of norm `size`; the authors' models have one row.",
            "The authors compute three forwards, of which the first two are equal; here it is two. What the second "
            "loss counts for is the factor that it is multiplied with; the paper: 1.",
        ),
    )
    whole_map = True
    size: NonNegativeFloat = 1.0  # norm of what is added to a row of scores; the authors search for it, task by task

    @classmethod
    def neutral(cls) -> AttentionAT:
        return cls(0.0)

    def idle(self, call: Call) -> bool:
        return not call.training or self.size == 0

    @at(Site.SCORES)
    def nudge(self, scores: Tensor, call: Call) -> Tensor:
        mine = call.state.forward  # what a checkpoint computes again finds as it was
        if call.name not in mine:
            last: Tensor | None = call.state.run.pop("added", None)
            if last is None or last.grad is None or last.shape != scores.shape:
                added = torch.zeros_like(scores).requires_grad_()
                mine[call.name] = call.state.run["added"] = added
            else:
                mine[call.name] = self.size * self.direction(last.grad)
        return scores + mine[call.name]

    def direction(self, gradient: Tensor) -> Tensor:
        """Where each row of scores `[b h r k]` is nudged, of norm one."""
        return normalize(gradient, dim=-1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama").train()
    inputs = models.tiny_inputs(model)
    with attach(model, AttentionAT()) as run:
        for _ in range(2):
            loss = run(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            print(loss.item())
