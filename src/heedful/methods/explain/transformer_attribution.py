"""R <- R + A_l R from R = I, with A_l the mean over heads of the positive part of gradient x weights."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import StatisticError
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Statistic
from heedful.methods.explain._layer_by_layer import LayerByLayer


class TransformerAttribution(LayerByLayer):
    """How relevant each token is to each position for what a backward was taken of, `[b n n]` for every such forward.

    `heedful.explaining.attribute(model, prompt, TransformerAttribution())` takes that backward. By hand: attach, run,
    call `backward()` on a logit, then ask the run. Rows and columns stand as the tokens were fed. The maps of all
    layers and their gradients are held until then, so texts should be short.
    """

    paper = Paper(
        "P243",
        "Transformer Interpretability Beyond Attention Visualization",
        "Hila Chefer, Shir Gur, Lior Wolf",
        2021,
        "2012.09838",
        "CVPR 2021",
        differs=(
            "The gradient is multiplied with the weights themselves, as in the authors' follow-up (2103.15679, rules 5 "
            "and 6), and not with the weights' relevance: that needs propagation rules for every module of a model, "
            "which only a rewritten model has.",
            "Rows are not normalised, as in the authors' code for images and the follow-up's rules for one sequence; "
            "their code for BERT divides each row of a layer's map plus I by its sum.",
        ),
    )
    one_text = True
    whole_map = True  # a tile's gradient would be spread over tiles

    @reads(Site.PATTERN)
    def follow(self, pattern: Tensor, call: Call) -> Statistic | None:
        self.require_whole(call)
        if pattern.requires_grad:
            pattern.retain_grad()
        return Cat({f"{call.forward:06d}": pattern})  # not detached: a backward is to come

    def answer(self, readings: Readings) -> list[Tensor]:
        """One `[b n n]` for each forward that a backward followed."""
        layers = [stat.pieces for stat in readings.values() if isinstance(stat, Cat)]
        found = [r for name in layers[0] if (r := _relevance([pieces[name] for pieces in layers])) is not None]
        if not found:
            raise StatisticError(
                f"{self!r} needs gradients, and none reached the maps of its {len(layers[0])} forwards: call "
                "backward() on a logit, as in run(input_ids=ids).logits[0, -1].max().backward(); generate() takes "
                "none, and heads chosen by .on(heads=...) get none"
            )
        return found


def _relevance(patterns: list[Tensor]) -> Tensor | None:
    """Rolled out from the first layer to the last, `[b n n]`; None without gradients."""
    out = torch.eye(patterns[0].shape[-1], dtype=patterns[0].dtype, device=patterns[0].device)
    for pattern in patterns:
        if pattern.grad is None:
            return None
        out = out + (pattern.grad * pattern.detach()).clamp(min=0).mean(1) @ out
    return out


if __name__ == "__main__":
    from heedful import models
    from heedful.explaining.attribution import attribute

    model, tokenizer, _ = models.default()
    ids = tokenizer("Paris is the capital of France, and Rome is the capital of", return_tensors="pt").input_ids
    for token, score in zip(ids[0], attribute(model, ids, TransformerAttribution()), strict=True):
        print(f"{score:6.3f}  {tokenizer.decode(token)}")
