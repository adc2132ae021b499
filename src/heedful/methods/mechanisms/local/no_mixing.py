"""o = D (silu(G x) * (U x)): a gated feed-forward part in attention's place, so that a token sees itself alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from heedful.authoring import Call, Layer, Method, Paper, PositiveFloat, Site, at
from heedful.kit.feature_maps import drawn


class NoMixing(Method):
    """The control that tells what mixing tokens is worth: as many parameters as attention has, and no other token.

    In every layer, or with `.on(layers=...)` between layers that attend. For models trained with it.
    """

    paper = Paper(
        "P285",
        "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
        "Huiyin Xue, Nafise Sadat Moosavi, Nikolaos Aletras",
        2025,
        "2510.11602",
        differs=(
            "The authors' full text was not at hand: this was read against its abstract and summaries.",
            "Of the paper's variants this is the one without token mixing; those of other scores, of fixed maps and of "
            "static queries and keys are not part of it.",
            "There are no biases, as in the paper's formula; weights are drawn as torch.nn.Linear draws them, by a "
            "generator seeded by the layer's number.",
            "Attention's own projections stay in the model, unused; no gradient reaches them.",
        ),
    )
    # parameters, as a share of the four projections that it stands in for; the paper: as many
    share: PositiveFloat = 1.0

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        both = layer.head_dim + layer.value_dim
        inner = max(1, round(self.share * (layer.heads + layer.kv_heads) * both / 3))
        e = layer.width
        return {"gate": drawn(random, inner, e), "up": drawn(random, inner, e), "down": drawn(random, e, inner)}

    @at(Site.BLOCK)
    def alone(self, hidden: Tensor, call: Call) -> Tensor:
        p = call.params
        x = hidden.to(p["gate"].dtype)
        return linear(silu(linear(x, p["gate"])) * linear(x, p["up"]), p["down"])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, NoMixing()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
