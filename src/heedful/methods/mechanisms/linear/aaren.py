"""Out_i = sum_{j <= i} softmax_j(q k_j) v_j: one learned query for all tokens, so that a mean that runs is enough."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, at
from heedful.kit.running import Running, grouped, wide


class Aaren(Method):
    """Softmax attention as a recurrent net: a layer asks the same of every text. For models trained with it."""

    paper = Paper(
        "P057",
        "Attention as an RNN",
        "Leo Feng, Frederick Tung, Hossein Hajimirsadeghi, Mohamed Osama Ahmed, Yoshua Bengio, Greg Mori",
        2024,
        "2405.13956",
        differs=(
            "The authors' text was not at hand: formulas were read against a reader's detailed notes of it.",
            "Each head learns its query itself, where the authors learn a token that the layer projects; what can be "
            "said is the same. The model's own projection to queries stays in it, unused.",
            "Keys come with the model's position embedding in them, and the learned query has none: under a rotary "
            "embedding, scores tell where in the text a key stands, and not how far behind.",
            "The scan over tokens is one over pieces of a text, each of which is computed at once.",
            "Queries are drawn from a normal distribution, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("text", "image")

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {"query": torch.randn(layer.heads, layer.head_dim, generator=random)}

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        running = Running(call, k)
        k, v = running.cut(k), running.cut(v)
        asked = call.params["query"].to(q)[None, :, None].expand(len(q), -1, -1, -1)  # [b h 1 d]
        scores = (grouped(asked, k.mT) * call.scale)[:, :, 0]
        return running.averaged("mean", scores, v).expand(-1, -1, q.shape[2], -1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, Aaren()) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
