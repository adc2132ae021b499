"""Out = concat_h(softmax(Q_h K_h^T / sqrt(d)) X_h) W_o: each head's values are a slice of the tokens."""

from __future__ import annotations

from torch import Tensor

from heedful.authoring import Call, Layer, Method, Site, at
from heedful.methods.mechanisms.score._sliced import PAPER, attended, maps


class OptimisedAttention(Method):
    """Attention without a map to values, with three quarters of its weights. For image models trained with it."""

    paper = PAPER
    subjects = ("image",)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return maps(layer, "query", "key", "out")

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        x = hidden.to(call.params["out"].dtype)
        return attended(x, call, x @ call.params["key"].mT, x)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, OptimisedAttention()) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
