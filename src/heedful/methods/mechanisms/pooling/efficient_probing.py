"""softmax(u_m x / sqrt(e)) over patches x, for M learned queries u; the m-th part of W x is averaged by the m-th."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, Site, at
from heedful.kit.feature_maps import drawn
from heedful.kit.patches import patch_tokens, whole_image


class EfficientProbing(Method):
    """Patches are pooled into the class token, for a classifier on a frozen model. Attach it to the last layer alone.

    Train it with the classifier behind it: `attach(model, EfficientProbing().on(layers=11))`, all else frozen.
    """

    paper = Paper(
        "P090",
        "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency",
        "Bill Psomas, Dionysis Christopoulos, Eirini Baltzi, Ioannis Kakogeorgiou, Tilemachos Aravanis, "
        "Nikos Komodakis, Konstantinos Karantzalos, Yannis Avrithis, Giorgos Tolias",
        2025,
        "2506.10178",
        "ICLR 2026",
        differs=(
            "What is pooled stands in the class token's place in the stream, so the model's last norm comes behind it, "
            "and over channels; the authors have one over the batch there, and the last norm, if at all, before it.",
            "As wide as the model; the authors may take a fraction of its channels.",
            "W is drawn as torch.nn.Linear draws it, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)
    every_token = True
    queries: PositiveInt = 32  # learned queries; the authors: 32 and others

    @classmethod
    def example(cls) -> EfficientProbing:
        return cls(4)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        if e % self.queries:
            rule = f"must divide the {e} channels of the model"
            raise FieldError(self, "queries", self.queries, rule, math.gcd(e, self.queries))
        value = drawn(random, e, e)
        return {"query": 0.02 * torch.randn(self.queries, e, generator=random), "value": value}

    def idle(self, call: Call) -> bool:
        return "cls" not in call.roles or not whole_image(call)

    @at(Site.RESIDUAL)
    def pool(self, stream: Tensor, call: Call) -> Tensor:
        p = {name: x.to(stream) for name, x in call.params.items()}
        x = stream[:, patch_tokens(self, call)]
        weights = (p["query"] @ x.mT / math.sqrt(x.shape[-1])).softmax(-1)  # [b m n]
        parts = linear(x, p["value"]).unflatten(-1, (self.queries, -1)).transpose(1, 2)  # [b m n e/m]
        pooled = (weights[:, :, None] @ parts).flatten(1)
        return stream.where(~call.marked_queries("cls")[:, 0, :, None], pooled[:, None])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, EfficientProbing(4).on(layers=1)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
