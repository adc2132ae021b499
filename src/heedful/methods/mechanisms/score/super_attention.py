"""Out = concat_h(softmax(Q_h X_h^T / sqrt(d)) (W_A X)_h) W_o, W_A a learned map over places."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from heedful.authoring import Call, Layer, Method, PositiveInt, Site, SiteError, at
from heedful.methods.mechanisms.score._sliced import PAPER, attended, maps


class SuperAttention(Method):
    """Keys are slices of the tokens, values these mixed by a map over places. For image models trained with it."""

    paper = replace(
        PAPER,
        differs=(
            "For images alone, whose tokens are always as many; the triangular map proposed for texts is not here.",
            *PAPER.differs[1:],
        ),
    )
    subjects = ("image",)
    every_token = True
    tokens: PositiveInt = 197  # L, of every image, a class token counted; that of ViT-B/16

    @classmethod
    def example(cls) -> SuperAttention:
        return cls(17)  # of the tiny model that laws are tried on

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return maps(layer, "query", "out", places=self.tokens)

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        if hidden.shape[1] != self.tokens:
            raise SiteError(
                f"{self!r}, layer {call.layer}: has a map over {self.tokens} places, and there are {hidden.shape[1]} "
                f"tokens; SuperAttention({hidden.shape[1]}) has one for these"
            )
        x = hidden.to(call.params["out"].dtype)
        return attended(x, call, x, call.params["places"] @ x)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, SuperAttention(5)) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
