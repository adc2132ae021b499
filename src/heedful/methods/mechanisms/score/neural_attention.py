"""s_ij = w3 . relu(W2 relu(W1 [Pq q_i; Pk k_j] + b1) + b2): a small net in place of the product of query and key."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, Layer, Method, Paper, Site, at
from heedful.kit.tile_scores import biased, operands


class NeuralAttention(Method):
    """Scores by a net over short forms of query and key, one net for a layer's heads. For models trained with it."""

    paper = Paper(
        "P094",
        "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
        "Andrew J. DiGiugno, Ausif Mahmood",
        2025,
        "2502.17206",
        differs=(
            "Read from the authors' code. It has the net in the first layer alone, for which there is .on(layers=0).",
            "Queries and keys come with the rotary embedding of a model that has one; the authors' model adds places "
            "to the tokens. The net tells places, not distances alone: texts padded on the left need position_ids, as "
            "`generate` gives them.",
            "The first layer's part of each query and each key is computed once, and added for every pair.",
            "A model's own factor and soft cap of the scores go with the product; a bias that it adds stays.",
            "The net's last bias is left out, since no softmax can tell it.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    forbids: ClassVar[dict[str, str]] = {
        "MultiTokenAttention": "it looks at rows of earlier calls, and a net scores the call's own queries alone"
    }
    # of the short forms and the first hidden layer, the second is half as wide; the authors: d / 32 = 2
    width: Annotated[int, Ge(2)] = 2

    @classmethod
    def example(cls) -> NeuralAttention:
        return cls(8)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, n, d = torch.Generator().manual_seed(layer.number), self.width, layer.head_dim
        found = {}
        for name, rows, columns in (("q", n, d), ("k", n, d), ("1", n, 2 * n), ("2", n // 2, n), ("3", 1, n // 2)):
            bound = 1 / math.sqrt(columns)
            found[f"weight_{name}"] = (torch.rand(rows, columns, generator=random) * 2 - 1) * bound
            if name != "3":
                found[f"bias_{name}"] = (torch.rand(rows, generator=random) * 2 - 1) * bound
        return found

    @at(Site.SCORES)
    def score(self, scores: Tensor, call: Call) -> Tensor:
        query, key = operands(self, call)
        q, k = self._map("q", query, call), self._map("k", key, call)
        of_query, of_key = call.params["weight_1"].split(self.width, 1)
        first = linear(q, of_query, call.params["bias_1"])[:, :, :, None] + call.spread(linear(k, of_key))[:, :, None]
        found = self._map("3", self._map("2", first.relu(), call).relu(), call)[..., 0]
        return biased(found.to(scores.dtype), call)

    def _map(self, name: str, x: Tensor, call: Call) -> Tensor:
        weight = call.params[f"weight_{name}"]
        return linear(x.to(weight.dtype), weight, call.params.get(f"bias_{name}"))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, NeuralAttention(8)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
