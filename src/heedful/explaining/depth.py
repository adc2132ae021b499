"""How far each layer is used: v_l = var(x_l), the angle from x_(l-1) to x_l, and the loss where x_l = x_(l-1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from heedful.adapters.wrapped import unwrapped
from heedful.api import attach, still
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.figures import Grid, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat
from heedful.explaining.drawn import Told
from heedful.explaining.states import named

PAPER = Paper(
    "P288",
    "When Does Sparsity Mitigate the Curse of Depth in LLMs",
    "Dilxat Muhtar, Xinyuan Song, Sebastian Pokutta, Max Zimmer, Nico Pelleriti, Thomas Hofmann, Shiwei Liu",
    2026,
    "2603.15389",
    differs=(
        "Layers are left out; for their usefulness the authors put the best linear map in a layer's place, which "
        "`linearity` fits and does not put there.",
        "How far a layer is from doing nothing is told by the angle that it turns states by; theirs is the distance of "
        "its Jacobian from the identity.",
        "Variances and angles are medians over tokens, since a few massive activations would speak for all.",
        "Their scores by what later layers do and by exchanging layers, and the training by which sparsity is to help, "
        "are not here.",
    ),
)
RISE = 0.1  # of the loss; the authors call a layer useful from here on


@dataclass(frozen=True, eq=False, repr=False)
class DepthUse(Told):
    """What each layer of a model does to its states, and what the model loses without it, `[layers]` each."""

    variance: Tensor  # of a state over its channels, as it leaves the layer; the median over tokens
    turn: Tensor  # the angle between a state before and behind the layer, in degrees; the median over tokens
    losses: Tensor  # with that layer left out
    loss: float  # with all of them

    @property
    def rise(self) -> Tensor:
        """What the loss rises by without each layer, as a share of what it is with all."""
        return self.losses / self.loss - 1

    @property
    def useful(self) -> float:
        """The share of layers without which the loss rises by more than a tenth."""
        return float((self.rise > RISE).double().mean())

    @property
    def figure(self) -> Grid:
        """The rise of the loss by layers."""
        what = "What the loss rises by where a layer is left out, as a share of the loss with all layers."
        layers = [str(n) for n in range(len(self.losses))]
        return Grid("depth", "Use of layers", what, self.rise[None], [""], layers, "", "layer")

    def __repr__(self) -> str:
        growth = float(self.variance[-1] / self.variance[0])
        return (
            f"{percent(self.useful)} of {len(self.losses)} layers are useful; layer {int(self.rise.argmin())} is the "
            f"least so.\nThe stream's variance behind the last layer is {growth:.3g} times that behind the first."
        )


@asks
def depth_use(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, only: str | None = None) -> DepthUse:
    """What each layer does to the stream, and how much the loss rises where it is left out.

    Batches hold "labels", so that the model gives a loss. Each layer takes a forward of all of them. `only` names the
    part of the model whose layers are tried, such as "model.decoder".
    """
    unwrapped(model)  # or the reason why there is no model in it
    given = [dict(batch) for batch in named("depth_use()", batches)]
    if any("labels" not in batch for batch in given):
        good = [{"input_ids": "...", "labels": "..."}]
        raise FieldError("depth_use()", "batches", len(given), 'must each have "labels"', good)
    reader = _Entering() | _Leaving()
    with torch.no_grad(), still(model), attach(model, reader, only=only) as run:
        loss = _loss(run, given)
        entering, leaving = run[_Entering()], run[_Leaving()]
    if not math.isfinite(loss):
        rule = "must have labels that count, for which the model gives a number"
        raise FieldError("depth_use()", "batches", loss, rule, [{"input_ids": "...", "labels": "..."}])
    if list(entering) != [0]:
        rule = f"must name one part of the model, where layers follow one another; here are {len(entering)}"
        raise FieldError("depth_use()", "only", only, rule, "model.decoder")
    states = [torch.cat(list(stat.value)) for stat in (entering[0], *leaving.values())]
    losses = []
    for layer in leaving:  # by their last attention: a decoder's layers may have two
        with torch.no_grad(), still(model), attach(model, _Without(layer), only=only) as run:
            losses.append(_loss(run, given))
    turns = [torch.nn.functional.cosine_similarity(x, y).clamp(-1, 1).arccos() for x, y in pairwise(states)]
    return DepthUse(
        torch.stack([x.var(1, correction=0).median() for x in states[1:]]),
        torch.stack([x.rad2deg().median() for x in turns]),
        torch.tensor(losses),
        loss,
    )


class _Entering(Method):
    """What enters the first layer, at tokens that are no padding."""

    @reads(Site.EMBEDDING)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return _text(stream, call)


class _Leaving(Method):
    """What leaves each layer, at the same tokens."""

    @reads(Site.RESIDUAL)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return _text(stream, call)


def _text(stream: Tensor, call: Call) -> Cat:
    return Cat.of(f"{call.forward:09d}", stream[call.is_text[:, 0].expand(len(stream), -1)].float())


class _Without(Method):
    """The stream leaves a layer as it entered it."""

    left_out: int

    def idle(self, call: Call) -> bool:
        return call.layer > self.left_out

    @reads(Site.EMBEDDING)
    def see_first(self, stream: Tensor, call: Call) -> None:
        call.state.forward["entered"] = stream

    @reads(Site.RESIDUAL)
    def see(self, stream: Tensor, call: Call) -> None:
        call.state.forward["entered"] = stream

    @at(Site.RESIDUAL)
    def skip(self, stream: Tensor, call: Call) -> Tensor:
        return call.state.forward["entered"] if call.layer == self.left_out else stream


def _loss(run: Any, batches: list[dict[str, Any]]) -> float:
    """The mean over batches."""
    return sum(float(run(**batch).loss) for batch in batches) / len(batches)
