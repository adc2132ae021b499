"""Linearity: how far one linear map, the best for all tokens, carries each token from a layer to the next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import unwrapped
from heedful.core.asked import asks
from heedful.core.errors import FieldError, ModelError
from heedful.core.figures import Grid
from heedful.core.paper import Paper
from heedful.explaining.drawn import Told
from heedful.explaining.states import named, streams

PAPER = Paper(
    "P244",
    "LLM-Microscope: Uncovering the Hidden Role of Punctuation in Context Memory of Transformers",
    "Anton Razzhigaev, Matvey Mikhalchuk, Temurbek Rahmatullaev, Elizaveta Goncharova, Polina Druzhinina, "
    "Ivan Oseledets, Andrey Kuznetsov",
    2025,
    "2502.15007",
    "NAACL 2025 Findings",
    differs=(
        "Of the authors' tools linearity alone: what a token knows of its prefix they read off by a copy of the model "
        "that learns to write the prefix down; their logit lens is `logit_lens`; there is no intrinsic dimension.",
        "A token's error is divided by the spread of the next layer's states, so that layers can be compared.",
        "States are those that leave the layers: the step from the embedding is not among the pairs.",
    ),
)


@dataclass(frozen=True, eq=False, repr=False)
class Linearity(Told):
    """What a linear map leaves of each token's way from one layer to the next, `[pairs tokens]`; 0 is nothing.

    Tokens stand in the order of the batches, without padding. An error of 1 is the layer's own spread.
    """

    errors: Tensor

    @property
    def layers(self) -> Tensor:
        """Each pair's linearity `[pairs]`: 1 where the map carries all tokens, 0 where it tells no more than a mean."""
        return 1 - self.errors.square().mean(1)

    @property
    def tokens(self) -> Tensor:
        """Each token's error, the mean over pairs `[tokens]`."""
        return self.errors.mean(0)

    @property
    def figure(self) -> Grid:
        """Linearity by layers."""
        pairs = [f"{n} to {n + 1}" for n in range(len(self.errors))]
        what = "How much of what the next layer makes of the states one linear map tells, of 1."
        return Grid("linearity", "Linearity of layers", what, self.layers[None], [""], pairs, "", "layers")

    def __repr__(self) -> str:
        least = int(self.layers.argmin())
        return (
            f"linearity {float(self.layers.mean()):.3f}, mean over {len(self.errors)} steps of a layer; the least "
            f"linear is from layer {least} to {least + 1}, {float(self.layers[least]):.3f}"
        )


@asks
def linearity(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, only: str | None = None) -> Linearity:
    """How linear each layer's step to the next is, and for which tokens it is least so.

    The map is fitted to all tokens of the batches, so these must be more than the states are wide, and better several
    times as many. `only` names the part of the model that is looked at, such as "model.encoder".
    """
    unwrapped(model)  # or the reason why there is no model in it
    kept = [streams(model, batch, only) for batch in named("linearity()", batches)]
    parts = list(dict.fromkeys(re.split(r"\d", name)[0].rstrip(".") for name in kept[0]))
    if len(parts) > 1:
        rule = f"must name one part of the model, where layers follow one another: {' or '.join(parts)}"
        raise FieldError("linearity()", "only", only, rule, parts[-1])
    states = [torch.cat(layer).double() for layer in zip(*(each.values() for each in kept), strict=True)]
    if len(states) < 2:
        rule = f"must have two layers or more to step from one to the next, and has {len(states)}"
        raise FieldError("linearity()", "model", type(model).__name__, rule, "a model of two layers")
    if len(shapes := dict.fromkeys(tuple(x.shape) for x in states)) > 1:
        rule = (
            f"must name layers whose states are alike; of tokens and channels here are {' and '.join(map(str, shapes))}"
        )
        raise FieldError("linearity()", "only", only, rule, "encoder.layers.0")
    tokens, width = states[0].shape
    if tokens <= width:
        rule = f"must hold more tokens than the {width} channels of the states, which a map would fit them all by"
        raise FieldError("linearity()", "batches", tokens, rule, 4 * width)
    if broken := [n for n, x in enumerate(states) if not bool(x.isfinite().all())]:
        raise ModelError(f"linearity(): states behind layer {broken[0]} are not finite. Take bfloat16 or float32")
    return Linearity(torch.stack([unmapped(x, y) for x, y in pairwise(states)]).float())


def unmapped(x: Tensor, y: Tensor) -> Tensor:
    """For states `[tokens e]` before and after, the length of what the best affine map leaves of each, `[tokens]`."""
    x, y = (z - z.mean(0) for z in (x, y))
    left = y - x @ (torch.linalg.pinv(x) @ y)
    found: Tensor = left.norm(dim=1) / y.square().sum(1).mean().sqrt().clamp(min=torch.finfo(y.dtype).tiny)
    return found
