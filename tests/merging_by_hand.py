"""Methods that send tokens behind a layer as they are told, and what comes of that by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call, Merged
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.kit.merging import averaged

from .samples import PAPER

To = tuple[tuple[int, ...], ...]
SIXTEEN = (0, 1, 1, 2, 3, 3, 3, 4, -1, 5, 6, 7, 7, 8, 8, 8, 1)  # of the 17 tokens of a small image


class Sends(Method):
    """Sends tokens behind a layer where it is told, row by row; a row for all where there is one."""

    paper = PAPER
    subjects = ("image",)
    causal = False
    chunk_invariant = False
    to: To
    layer: int = 0

    @at(Site.RESIDUAL, merges=True)
    def send(self, stream: Tensor, call: Call) -> Tensor | Merged:
        if call.layer != self.layer:
            return stream
        to = torch.tensor(self.to).expand(len(stream), -1)
        return Merged(averaged(stream, to, torch.ones_like(stream[..., 0])), to)


class SendsTwice(Sends):
    """Sends the tokens that are left behind the next layer too: the second into the first."""

    @at(Site.RESIDUAL, merges=True)
    def send(self, stream: Tensor, call: Call) -> Tensor | Merged:
        if call.layer != self.layer + 1:
            return Sends.send(self, stream, call)
        to = torch.arange(stream.shape[1]).expand(len(stream), -1) - 1
        return Merged(averaged(stream, to.clamp(min=0), torch.ones_like(stream[..., 0])), to.clamp(min=0))


class Spy(Method):
    """Writes down what the layers are told, in `call.state.run`."""

    paper = PAPER

    @at(Site.HEAD_OUTPUT)
    def look(self, heads: Tensor, call: Call) -> Tensor:
        call.state.run["told"] = call
        return heads * 2


def told(run: Any, layer: int) -> Call:
    found: Call = run.state._of_run[1, layer]["told"]
    return found


def by_hand(stream: Tensor, to: tuple[int, ...]) -> Tensor:
    """The means of the tokens `[n e]` that go together."""
    rows = [[stream[i] for i, there in enumerate(to) if there == j] for j in range(max(to) + 1)]
    return torch.stack([sum(row[1:], row[0]) / len(row) for row in rows])


def back(stream: Tensor, before: Tensor, to: tuple[int, ...]) -> Tensor:
    return torch.stack([before[i] if j < 0 else stream[j] for i, j in enumerate(to)])


def blocks(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def image_model(attention: str = "eager") -> tuple[Any, dict[str, Tensor]]:
    model = models.tiny("vit", num_hidden_layers=4, image_size=16, attn_implementation=attention)
    return model, models.tiny_inputs(model, batch=3)


@torch.no_grad()
def under(model: Any, what: Any, inputs: dict[str, Tensor], **how: Any) -> Tensor:
    with attach(model, what, **how) as run:
        out: Tensor = run(**inputs, output_hidden_states=True).hidden_states[-1]
    return out


def alike(found: Tensor, want: Tensor) -> None:
    assert found.shape == want.shape
    assert close_model(found, want)


@torch.no_grad()
def expected(model: Any, inputs: dict[str, Tensor], to: To, layer: int) -> tuple[Tensor, Tensor]:
    """The stream behind the last layer, and the logits, one image after another."""
    out = []
    for row, pixels in enumerate(inputs["pixel_values"]):
        mine = to[row % len(to)]
        before = blocks(model.vit.layers[: layer + 1], model.vit.embeddings(pixels[None]))[0]
        left = blocks(model.vit.layers[layer + 1 :], by_hand(before, mine)[None])[0]
        out.append(back(left, before, mine))
    stream = torch.stack(out)
    return stream, model.classifier(model.vit.layernorm(stream)[:, 0])


RAGGED = (SIXTEEN, (0, *[-1] * 8, 1, 2, *[-1] * 5, 3), tuple(range(17)))
