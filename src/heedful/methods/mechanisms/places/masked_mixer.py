"""o_i = sum_{j <= i} w_ij x_j + b_i: a learned map over places in attention's place, the same for every text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.state import ByIndex


class MaskedMixer(Method):
    """Tokens of the past mixed by weights of the two places alone, negative ones too. For models trained with it."""

    paper = Paper(
        "P241",
        "Masked Mixers for Language Generation and Retrieval",
        "Benjamin L. Badger",
        2024,
        "2409.01482",
        differs=(
            "The flat mixer, one convolution of width one over tokens; those with heads, or with two convolutions and "
            "an activation between, are not part of it.",
            "Padding counts for nothing and places count the text; the authors' texts are padded to one length, and "
            "their padding is mixed like any token.",
            "Weights are drawn as torch.nn.Conv1d draws them, by a generator seeded by the layer's number.",
        ),
    )
    one_text = True
    tokens: PositiveInt = 512  # places that have weights, and so the longest text; the authors: 512

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random, bound = torch.Generator().manual_seed(layer.number), 1 / math.sqrt(self.tokens)
        shapes = {"places": (self.tokens, self.tokens), "bias": (self.tokens,)}
        return {name: (torch.rand(shape, generator=random) * 2 - 1) * bound for name, shape in shapes.items()}

    @at(Site.BLOCK)
    def mix(self, hidden: Tensor, call: Call) -> Tensor:
        if not call.mask.causal:
            raise SiteError(f"{self!r}, layer {call.layer}: mixes what came before; restrict it to causal layers")
        weight, bias = call.params["places"], call.params["bias"]
        x = hidden.to(weight.dtype)
        place = call.q_pos[:, 0].masked_fill(~call.is_text[:, 0], -1).expand(x.shape[:2])
        if bool((place >= self.tokens).any()):
            raise SiteError(
                f"{self!r}, layer {call.layer}: has weights of {self.tokens} places, and a text is longer; train it "
                "with more tokens, or read shorter texts"
            )
        tokens, before = _so_far(call, "tokens", x), _so_far(call, "place", place)
        asked, seen = place.clamp(min=0), before.clamp(min=0)
        mixed = weight[asked[:, :, None], seen[:, None]]  # [b n k]
        unseen = (before < 0)[:, None] | (before[:, None] > place[:, :, None])
        return mixed.masked_fill(unseen, 0.0) @ tokens + bias[asked][..., None]


def _so_far(call: Call, name: str, own: Tensor) -> Tensor:
    """Something of the text's tokens up to the call's last `[b k ...]`; keeps it with the cache."""
    first, before = call.queries.first or 0, call.state.cache.get(name, own[:, :0])
    if before.shape[1] != first:
        raise SiteError(
            f"layer {call.layer}: a mixer goes on from token {first}, and holds {before.shape[1]} of those before; was "
            "the cache made without it? Read the text again from its start"
        )
    own = torch.cat([before, own], 1)
    call.state.cache[name] = ByIndex(own, 1)
    return own


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, MaskedMixer(64)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
