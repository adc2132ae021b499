"""g softmax(s) + (1 - g) softmax(s within w places of the highest), g = sigmoid(u q + c): the source, and a part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from heedful.authoring import Call, Layer, Method, NonNegativeInt, Paper, Site, SiteError, at
from heedful.core.positions import spread_heads
from heedful.kit.feature_maps import with_bias


class ContextAwareCrossAttention(Method):
    """What stands around the place that is looked at most gets more. For encoder-decoders trained with it."""

    paper = Paper(
        "P146",
        "Context-Aware Cross-Attention for Non-Autoregressive Translation",
        "Liang Ding, Longyue Wang, Di Wu, Dacheng Tao, Zhaopeng Tu",
        2020,
        "2011.00770",
        "COLING 2020",
        differs=(
            "Both patterns are mixed and multiply the values once, as in the authors' code; it is linear in them.",
            "It acts in all layers that it is attached to; the authors' script has it in the upper three of six.",
            "The window counts places of the text, so that padding is no part of it.",
            "The gate is drawn as torch.nn.Linear draws it, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("cross",)
    window: NonNegativeInt = 9  # places to either side of the one that is looked at most; the authors' script: 9

    @classmethod
    def example(cls) -> ContextAwareCrossAttention:
        return cls(1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return with_bias(random, "gate", 1, layer.head_dim)  # one for all heads

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.NORMALISE)
    def attend(self, scores: Tensor, call: Call) -> Tensor:
        there = self.around(scores.argmax(-1, keepdim=True), call)
        local = scores.masked_fill(~there, torch.finfo(scores.dtype).min).softmax(-1)
        gate = self.gate(call).to(scores.dtype)
        return gate * scores.softmax(-1) + (1 - gate) * local

    def around(self, highest: Tensor, call: Call) -> Tensor:
        """Which of the tile's keys stand near enough to the column `highest [b h r 1]`, `[b h r k]`."""
        places = spread_heads(call.k_pos, call.heads)[:, :, None]
        centre = places.expand(*highest.shape[:3], -1).gather(-1, highest)
        return (places - centre).abs() <= self.window

    def gate(self, call: Call) -> Tensor:
        """What each of the tile's queries leaves to the pattern over all of the source, `[b h r 1]`."""
        p, query = call.params, call.query
        if query is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the gate reads queries, and none are handed")
        logits = linear(query.to(p["gate"].dtype) * call.scale, p["gate"], p["gate_bias"])
        return pad(logits, (0, 0, call.earlier, 0))[:, :, call.rows].sigmoid()


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.arange(3, 19)[None]
    with attach(model, ContextAwareCrossAttention(2), only=("model.decoder.layers.0.encoder_attn",)) as run:
        print(run(input_ids=ids, decoder_input_ids=ids[:, :5]).logits.std(), run.activity())
