"""u_ij = v . tanh(W1 k_j + W2 q_i), and softmax(u_i) is itself the answer: a place of a source of any length."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, at
from heedful.kit.feature_maps import drawn
from heedful.kit.tile_scores import additive, biased, operands


class PointerNetwork(Method):
    """Additive scores, whose pattern is what a net says. For models trained with it.

    A net that points reads the pattern: `_, weights = nn.Attention(width, 1, PointerNetwork())(state, read, read,
    need_weights=True)`, trained by the logarithm of the weight on the right place. Where values are mixed it is
    additive attention.
    """

    paper = Paper(
        "P060",
        "Pointer Networks",
        "Oriol Vinyals, Meire Fortunato, Navdeep Jaitly",
        2015,
        "1506.03134",
        "NeurIPS 2015",
        differs=(
            "Queries and keys are projections of the two nets' states, which the authors' W1 and W2 see straight; one "
            "product of matrices is as good as another, where the units are no more than a head is wide.",
            "One net serves a layer's heads; the authors' attention has one head.",
            "Each query and each key is projected once, and the sums are made for every pair.",
            "A model's own factor and soft cap of the scores go with the product; a bias that it adds stays.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
            "The authors' decoder, which is fed what it points at, and its search for valid answers are not here.",
        ),
    )
    forbids: ClassVar[dict[str, str]] = {
        "MultiTokenAttention": "it looks at rows of earlier calls, and a net scores the call's own queries alone"
    }
    units: PositiveInt = 64  # of the net's only layer; the authors: as many as a state has

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, n, d = torch.Generator().manual_seed(layer.number), self.units, layer.head_dim
        return {"of_query": drawn(random, n, d), "of_key": drawn(random, n, d), "out": drawn(random, 1, n)}

    @at(Site.SCORES)
    def point(self, scores: Tensor, call: Call) -> Tensor:
        query, key = operands(self, call)
        p = call.params
        found = additive(query, call.spread(key), p["of_query"], p["of_key"], p["out"])
        return biased(found.to(scores.dtype), call)


if __name__ == "__main__":
    from heedful.nn import Attention

    torch.manual_seed(0)
    pointer = Attention(16, 1, PointerNetwork(), batch_first=True)
    for length in (5, 9):
        read, state = torch.randn(1, length, 16), torch.randn(1, 2, 16)
        _, weights = pointer(state, read, read, need_weights=True)
        print(weights.argmax(-1))
