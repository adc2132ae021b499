"""Two real pictures, a flower and a palace: a round piece of one in crops of the other, and where it is."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from heedful import models

SIDE, PATCH = 224, 14
GRID = SIDE // PATCH
MEAN, SPREAD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@cache
def model() -> Any:
    return models.vision().model


@cache
def picture(name: str) -> Tensor:
    """The whole of it, `[3 rows cols]`, in the model's colours."""
    pixels = torch.tensor(load_sample_image(f"{name}.jpg")).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(SPREAD)[:, None, None]


def crop(name: str, draw: torch.Generator, low: int, high: int) -> Tensor:
    """A square piece of a picture, drawn, as the model takes it, `[3 224 224]`; half of them mirrored."""
    whole = picture(name)
    side = int(torch.randint(low, high, (), generator=draw))
    top, left = (int(torch.randint(n - side + 1, (), generator=draw)) for n in whole.shape[1:])
    piece = whole[:, top : top + side, left : left + side]
    piece = torch.nn.functional.interpolate(piece[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]
    return piece.flip(-1) if torch.rand((), generator=draw) < 0.5 else piece


def flower(draw: torch.Generator) -> Tensor:
    """The middle of the flower, `[3 224 224]`, a little moved and of some size."""
    whole, side = picture("flower"), int(torch.randint(200, 300, (), generator=draw))
    top, left = (int(n / 2 - side / 2 + torch.randint(-30, 31, (), generator=draw)) for n in whole.shape[1:])
    piece = whole[:, top : top + side, left : left + side]
    return torch.nn.functional.interpolate(piece[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def scenes(draw: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Crops of the palace with a disc of the flower in each `[b 3 224 224]`, and which patches it covers `[b 256]`."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    found, covered = [], []
    for _ in range(count):
        back, front = crop("china", draw, 200, 400), flower(draw)
        radius = int(torch.randint(30, 56, (), generator=draw))
        row, col = torch.randint(radius, SIDE - radius, (2,), generator=draw).tolist()
        disc = (y - row) ** 2 + (x - col) ** 2 < radius**2
        small = torch.nn.functional.interpolate(front[None], (2 * radius,) * 2, mode="bilinear", antialias=True)[0]
        put = back.clone()
        put[:, row - radius : row + radius, col - radius : col + radius] = small
        found.append(torch.where(disc, put, back))
        covered.append(disc.float().unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).mean((-1, -2)).flatten() > 0.5)
    return torch.stack(found), torch.stack(covered)


def average_precision(score: Tensor, right: Tensor) -> float:
    """How far ahead those that are right stand, `[n]` each: the mean precision down to each of them."""
    ranked = right[score.argsort(descending=True)].double()
    return float((ranked.cumsum(0) / torch.arange(1, len(ranked) + 1) * ranked).sum() / ranked.sum())
