"""What losses on words' maps share: the maps of a forward, a loss of them, and the way it moves what is denoised."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, doc
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.ranges import NonNegativeFloat, Share
from heedful.core.sites import Site, penalises

SIGMA = 0.5  # of the smoothing over a picture's places
LITTLE = 1e-8  # beside the height of a map, which may be 0


_Side = Annotated[int, Ge(2)]
PictureGrid = Annotated[tuple[_Side, _Side], doc("must be rows and columns, each 2 or more")]


class MapLoss(Method, abstract=True):
    """A loss of cross-attention's maps, which are averaged over heads and over the layers that it is attached to.

    Layers whose pictures have places of one number go together: `.on(layers=...)` says which.
    """

    whole_map = True
    subjects = ("cross",)

    def idle(self, call: Call) -> bool:
        return not call.cross

    @penalises(Site.PATTERN)
    def penalise(self, pattern: Tensor, call: Call) -> Tensor:
        mine, kept = pattern.mean(1).masked_fill(~call.is_text[:, 0, :, None], 0.0), call.state.forward
        so_far = kept.get("maps", torch.zeros_like(mine))
        if so_far.shape != mine.shape:
            rule = f"maps of layer {call.layer} are {list(mine.shape[1:])}, of those before {list(so_far.shape[1:])}"
            raise FieldError(self, "on", call.layer, rule, ".on(layers=...) with layers of one size")
        kept["maps"], kept["layers"] = so_far + mine, kept.get("layers", 0) + 1
        loss = self.loss(kept["maps"] / kept["layers"], call)
        # what a layer adds, so that over layers it is the loss of their mean, whichever layer is the last
        before, kept["loss"] = kept.get("loss", 0.0), loss
        return loss - before

    @abstractmethod
    def loss(self, maps: Tensor, call: Call) -> Tensor:
        """A number, from what the picture's places give to words, `[b n k]`."""


class Guidance(MapLoss, abstract=True):
    """A loss by which a diffusion model's caller moves what is denoised, `x`, before a step is taken.

        with run.denoising(i, of=steps), torch.enable_grad():
            run(x.requires_grad_(), ...)
            x = method.moved(x, run.loss(), i, of=steps)

    Its sum over a batch's pictures is taken, so that each moves as it would alone.
    """

    rate: NonNegativeFloat = 20.0  # of the move at first; it falls to the root of a half of it; the authors: 20
    until: Share = 0.5  # share of the steps after which nothing moves
    grid: PictureGrid | None = None  # rows and columns of the picture, for maps to be smoothed; None: they are not

    def shared(self, maps: Tensor, words: Tensor, sharpness: float) -> Tensor:
        """What words `[b|1 k]` win of each place from one another, smoothed."""
        scores = (sharpness * maps).masked_fill(~words[:, None], torch.finfo(maps.dtype).min)
        return smoothed(self, scores.softmax(-1), self.grid)

    def moved(self, x: Tensor, loss: Tensor, number: int, of: int) -> Tensor:
        """`x` down the slope of its loss, at step `number` of so many."""
        if number >= self.until * of:
            return x.detach()
        (slope,) = torch.autograd.grad(loss, x)
        return (x - self.rate * math.sqrt(1 - number / max(1, of - 1) / 2) * slope).detach()


def smoothed(owner: object, maps: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Maps `[b n k]` under a Gaussian three places wide, reflected at the borders; without a grid as they are."""
    if grid is None:
        return maps
    if math.prod(grid) != maps.shape[1]:
        rule = f"must hold the {maps.shape[1]} places of the picture, and holds {math.prod(grid)}"
        raise FieldError(owner, "grid", grid, rule, (1, maps.shape[1]))
    side = math.exp(-1 / (4 * SIGMA**2))  # the authors' code: e^-(x / 2 sigma)^2
    taps = maps.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    laid = F.pad(maps.mT.unflatten(-1, grid), (1, 1, 1, 1), mode="reflect")
    found = F.conv2d(laid.flatten(0, 1)[:, None], torch.outer(taps, taps)[None, None])
    return found.view(*maps.mT.shape).mT


def levelled(x: Tensor, axes: tuple[int, ...] = (1,)) -> Tensor:
    """From 0 at the lowest to 1 at the highest, as maps `[b n k]` over places; zeros where all is even."""
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (x - low) / (high - low + LITTLE)
