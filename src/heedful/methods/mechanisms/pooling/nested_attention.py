"""A_s v_s <- A_s softmax(q K^T) V: what a subject's word s gives depends on who asks; K and V are learnt for it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt, RoleName
from heedful.core.sites import Site, at


class NestedAttention(Method):
    """One word of a prompt stands for a subject of many parts: places of the picture take of it what is theirs.

    Attach it to the layers of cross-attention, with a role that names the word, and train its parameters; the model may
    stay as it is. How much a place looks at the word is decided as before.
    """

    paper = Paper(
        "P242",
        "Nested Attention: Semantic-aware Attention Values for Concept Personalization",
        "Or Patashnik, Rinon Gal, Daniil Ostashev, Sergey Tulyakov, Kfir Aberman, Daniel Cohen-Or",
        2025,
        "2501.01407",
        "SIGGRAPH 2025",
        differs=(
            "Nested keys and values are learnt for one subject; the authors project them from an encoder of images, "
            "trained over many.",
            "Read off the authors' page and abstract: what else the paper does to nested values is not here.",
        ),
    )
    whole_map = True
    subjects = ("cross",)
    tokens: PositiveInt = 8  # of the subject in each layer; 1 is a value like any other word's
    role: RoleName = "subject"  # the word that stands for it, among the keys
    spread: PositiveFloat = 0.02  # standard deviation of what is learnt at the start

    @classmethod
    def example(cls) -> NestedAttention:
        return cls(4, "marked", 1.0)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        widths = {"keys": layer.head_dim, "values": layer.value_dim}
        return {
            name: self.spread * torch.randn(layer.kv_heads, self.tokens, width, generator=random)
            for name, width in widths.items()
        }

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.PATTERN)
    def part(self, pattern: Tensor, call: Call) -> Tensor:
        subject = call.spread(call.marked(self.role))[:, :, None]
        call.state.forward[str(call.layer)] = (pattern * subject).sum(-1, keepdim=True)
        return pattern.masked_fill(subject, 0.0)

    @at(Site.HEAD_OUTPUT)
    def nest(self, heads: Tensor, call: Call) -> Tensor:
        keys, values = (call.spread(call.params[name][None]) for name in ("keys", "values"))
        query = cast(Tensor, call.query)  # there is one from MASK on
        own = self.weights(call.capped(call.scale * query @ keys.mT)) @ values
        return heads + call.state.forward[str(call.layer)] * own

    def weights(self, scores: Tensor) -> Tensor:
        """Of the subject's tokens, `[b h n tokens]`."""
        return scores.softmax(-1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 12))
    names = [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    model.requires_grad_(False)
    with attach(model, NestedAttention(), only=names, roles={"subject": ((2, 3),)}) as run:
        optimiser = torch.optim.Adam(run.parameters(), 0.1)
        for _ in range(4):
            loss = run(input_ids=ids, decoder_input_ids=ids, labels=ids).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            print(loss.item())
