"""Visual sinks: does a model answer as well when its text sees none of the sinks among the image's tokens?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from claims import P016_sight
from claims._seeing import in_picture, joined, shown, told
from claims.ledger import run
from claims.P016_sight import BEHIND, LAYERS, fitted, sunk
from heedful.authoring import Call, Site, at
from heedful.methods import VAR

PICTURES = 16


class _Dropped(VAR):
    """Behind the image no token sees its sinks; or as many of its other tokens, drawn at random.

    The very first token stays, on which the language model parks whatever it is.
    """

    drawn: bool = False

    @at(Site.PATTERN)
    def redistribute(self, pattern: Tensor, call: Call) -> Tensor:
        layer, sinks = call.state.forward.get("sinks", (None, None))
        if sinks is None or layer != call.below:
            return pattern
        image = (call.marked(self.role) & (call.k_pos > 0))[:, 0].expand(len(sinks), -1)
        gone = image & sinks
        if self.drawn:
            other = image & ~sinks
            rank = torch.rand(other.shape).masked_fill(~other, 2.0).argsort(1).argsort(1)
            gone = other & (rank < gone.sum(1, keepdim=True))
        behind = call.pairs.q >= call.region(self.role)[0][1]
        left = pattern.masked_fill(gone[:, None, None] & behind, 0.0)
        return left / left.sum(-1, keepdim=True)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, item, method = joined(seed), shown(seed, PICTURES, "", BEHIND), fitted(seed)
    numbers = sunk(model, item, method)
    ways = {
        "whole image": None,
        "sinks dropped": _Dropped("image", dims=method.dims),
        "others dropped": _Dropped("image", dims=method.dims, drawn=True),
    }
    plain = told(model, item).double().log_softmax(-1)
    for name, way in ways.items():
        found = told(model, item, way and way.on(layers=LAYERS)).double().log_softmax(-1)
        numbers |= {f"{what}, {name}": x for what, x in in_picture(found, item.there).items()}
        numbers[f"nats moved, {name}"] = float((plain.exp() * (plain - found)).sum(-1).mean())
    return numbers["log-probability, sinks dropped"] - numbers["log-probability, others dropped"], numbers


CLAIM = replace(
    P016_sight.CLAIM,
    key="P016_dropped",
    says="Without the sinks among an image's tokens, which get much weight, a model answers as well as with them.",
    paper_number="performance as with them, and worse without as many others; the figures are drawn",
    setup=P016_sight.setting(PICTURES)
    + " In each layer text sees none of the image's tokens that are sinks there, but for the very first, on which the "
    "language model parks whatever it is; or, as the control, as many of its others, drawn at random. Details: how "
    "many sinks there are, the first among them, and what they are given.",
    effect="log-probability of the picture's colours without its sinks, above that without as many other tokens",
    measure=measure,
    seeds=8,
    strong=0.0,
)

if __name__ == "__main__":
    run(CLAIM)
