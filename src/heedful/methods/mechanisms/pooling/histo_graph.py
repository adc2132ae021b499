"""h = sum_l c_l h_l / sum_l c_l of each patch, c_l the mean of Q h_L . K h_l / sqrt(e); patches attend; their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, at, reads
from heedful.kit.feature_maps import drawn, with_bias
from heedful.kit.patches import patch_tokens, whole_image
from heedful.methods.mechanisms.pooling._attending import attended, attending, norm, normed, through


class HistoGraph(Method):
    """A readout over what each patch was in all layers, which its last state asks. For models trained with it.

    It keeps what enters an encoder's first layer and what every one hands on, and stands behind the last, whose class
    token it replaces. Where a model also reads a text, `attach(..., only=...)` spares that one's last layer parameters
    that it does not use.
    """

    paper = Paper(
        "P286",
        "Learning from Historical Activations in Graph Neural Networks",
        "Yaniv Galron, Hadar Sinai, Haggai Maron, Moshe Eliasof",
        2026,
        "2601.01123",
        "ICLR 2026",
        differs=(
            "Written from the paper's abstract and from notes that have its formulas; the authors' code was not to be "
            "had. Queries and keys have no bias, and one map serves all layers. The residual and the norm behind what "
            "patches find of one another, which are optional, are there.",
            "Nodes are the patches of an image, and all of them see one another; the authors' are nodes of a graph.",
            "What comes of it stands in the class token's place, before the model's last norm.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("image",)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if not layer.ends_list:
            return {}
        random, e = torch.Generator().manual_seed(layer.number), layer.width
        asks = {"query": drawn(random, e, e), "key": drawn(random, e, e)}
        return with_bias(random, "embed", e, e) | asks | attending(random, "nodes", e) | norm("norm", e)

    def idle(self, call: Call) -> bool:
        return "cls" not in call.roles or not whole_image(call)

    @reads(Site.EMBEDDING)
    def begin(self, stream: Tensor, call: Call) -> None:
        _states(call)[-1] = stream

    @at(Site.RESIDUAL)
    def read_out(self, stream: Tensor, call: Call) -> Tensor:
        states = _states(call)
        states[call.layer] = stream
        if not call.ends_list:
            return stream
        p, patches = {name: x.to(stream) for name, x in call.params.items()}, patch_tokens(self, call)
        history = through(p, "embed", torch.stack([states[at][:, patches].to(stream) for at in sorted(states)], 2))
        history = history + _places(history)  # [b n layers e]
        asked = history[:, :, -1:] @ p["query"].mT
        scores = (asked @ (history @ p["key"].mT).mT)[:, :, 0].mean(1) / math.sqrt(stream.shape[-1])
        nodes = torch.einsum("bl,bnle->bne", self.shares(scores), history)
        nodes = normed(p, "norm", nodes + attended(p, "nodes", nodes, nodes, call.heads))
        return stream.where(~call.marked_queries("cls")[:, 0, :, None], nodes.mean(1, keepdim=True))

    def shares(self, scores: Tensor) -> Tensor:
        """Each layer's, of an image's scores `[b layers]`; they add up to 1, and some may be below 0."""
        return scores / scores.sum(-1, keepdim=True)


def _states(call: Call) -> dict[int, Tensor]:
    """What was handed on so far, by layer, in the list of layers that this one stands in."""
    states: dict[int, Tensor] = call.state.forward.setdefault(f"states from {call.lowest}", {})
    return states


def _places(history: Tensor) -> Tensor:
    """Sinusoids for the layers `[layers e]`, as for places of a text: sines and cosines in turns."""
    layers, e = history.shape[-2:]
    pace = 10_000 ** (-torch.arange(0, e, 2, device=history.device, dtype=history.dtype) / e)
    turn = torch.arange(layers, device=history.device, dtype=history.dtype)[:, None] * pace
    return torch.stack([turn.sin(), turn.cos()], -1).flatten(1)[:, :e]


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit")
    with attach(model, HistoGraph()) as run:
        print(run.difference(**models.tiny_inputs(model)))
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
