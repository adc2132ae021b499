"""s_ij = (W_q p_i) (W_k p_j), p sines and cosines of a place: where to look is told by places alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, at
from heedful.core.positions import spread_heads
from heedful.kit.tile_scores import biased


class PositionalAttention(Method):
    """Queries and keys of places, the same in every layer and for every text; for models trained with it."""

    paper = Paper(
        "P059",
        "Positional Attention: Expressivity and Learnability of Algorithmic Computation",
        "Artur Back de Luca, George Giapitzakis, Shenghao Yang, Petar Veličković, Kimon Fountoulakis",
        2025,
        "2410.01686",
        "ICML 2025",
        differs=(
            "A place is told by sines and cosines, as many as the layer is wide; in the authors' code by a number for "
            "each place that is one there and zero elsewhere. Neither adds it to the tokens.",
            "Scores are products as in the paper's formula; the authors' code adds biases to queries and keys, has "
            "these in each head as wide as what tells a place, and divides by the root of that.",
            "The rest of the model stays: in the authors' layers a net is shown what came in and what attention makes "
            "of it side by side, without a sum of both.",
            "The model's own queries and keys, its factor and its soft cap go unused; a bias that it adds stays.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("text", "image")

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        shape = (layer.heads, layer.head_dim, layer.width)
        bound = 1 / math.sqrt(layer.width)
        return {name: (torch.rand(shape, generator=random) * 2 - 1) * bound for name in ("query", "key")}

    @at(Site.SCORES)
    def score(self, scores: Tensor, call: Call) -> Tensor:
        q, k = (self._map(name, place, call) for name, place in (("query", call.q_pos), ("key", call.k_pos)))
        return biased((q @ k.mT).to(scores.dtype).expand_as(scores), call)

    def _map(self, name: str, place: Tensor, call: Call) -> Tensor:
        weight = call.params[name]
        return waves(spread_heads(place, call.heads), weight.shape[-1]).to(weight) @ weight.mT  # [b|1 h n d]


def waves(place: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of places `[...]` at rates from 1 down to 1 / 10000, `[... width]`."""
    half = (width + 1) // 2
    rates = 10000.0 ** (-torch.arange(half, device=place.device, dtype=torch.float64) / half)
    angles = place[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[..., :width]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, PositionalAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
