"""Out = concat_h(softmax(Q_h X_h^T / sqrt(d)) X_h) W_o: a slice of the tokens' own channels as keys and values."""

from __future__ import annotations

from torch import Tensor

from heedful.authoring import Call, Layer, Method, Site, at
from heedful.methods.mechanisms.score._sliced import PAPER, attended, maps


class HalvedAttention(Method):
    """The paper's "Efficient Attention", of which there is another: neither keys nor values have a map, and half of the
    weights are left. For image models trained with it."""

    paper = PAPER
    subjects = ("image",)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return maps(layer, "query", "out")

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        x = hidden.to(call.params["out"].dtype)
        return attended(x, call, x, x)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, HalvedAttention()) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
