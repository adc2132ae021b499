"""Out = sum_h O_h V_h X softmax(X^T K_h^T Q_h x / sqrt(r)): maps of a rank r that is chosen, not width over heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, Site, at
from heedful.kit.feature_maps import drawn
from heedful.methods.mechanisms.score._sliced import joined, require_open


class RankedHeads(Method):
    """As many heads, of as high a rank, as one likes: rank and number are two settings. For image models trained so.

    A few heads of full rank can do what many low ones cannot; a model's own heads have the layer's width over their
    number.
    """

    paper = Paper(
        "P096",
        "On the Benefits of Rank in Attention Layers",
        "Noah Amsel, Gilad Yehudai, Joan Bruna",
        2024,
        "2407.16153",
        differs=(
            "A mechanism to train models with; of the authors' theorems, and of depth in place of rank, nothing is "
            "here.",
            "For images alone: no cache holds such keys.",
            "A head's values have the rank too; in the authors' code they have the layer's width, and one map stands "
            "for those of a head's values and output.",
            "There are no biases; weights are drawn as torch.nn.Linear draws them, by a generator seeded by the "
            "layer's number. The model's own projections stay in it, unused.",
        ),
    )
    subjects = ("image",)
    rank: PositiveInt = 64  # r, numbers that a query is told by in each head; the authors: up to the layer's width
    heads: PositiveInt = 12  # H; the authors: from one to many times the width over the rank

    @classmethod
    def example(cls) -> RankedHeads:
        return cls(24, 2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if self.rank > layer.width:
            raise FieldError(
                self, "rank", self.rank, f"must be at most the layer's width of {layer.width}", layer.width
            )
        random = torch.Generator().manual_seed(layer.number)
        inner = self.rank * self.heads
        sizes = dict.fromkeys(("query", "key", "value"), (inner, layer.width)) | {"out": (layer.width, inner)}
        return {name: drawn(random, *size) for name, size in sizes.items()}

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        require_open(call, "attention of a chosen rank")
        p = call.params
        q, k, v = (linear(hidden.to(p["out"].dtype), p[name]) for name in ("query", "key", "value"))
        return joined(q, k, v, self.heads, p["out"])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, RankedHeads(24, 1)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
