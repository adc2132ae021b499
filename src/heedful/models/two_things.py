"""Small pictures of two coloured things that words name: what the small denoiser draws, and what is known of them."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 16  # of a picture
RADIUS, HALF = 3, SIDE // 2  # a thing is 7 wide, and stays in its half
PLACES = (SIDE - 2 * RADIUS) * (HALF - 2 * RADIUS)  # where a thing may stand in its half
COLOURS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 0.8, 0.0), "blue": (0.1, 0.2, 1.0), "yellow": (1.0, 0.9, 0.0)}
SHAPES = ("square", "disc", "cross", "frame")
GROUNDS = {"dark": 0.15, "grey": 0.5, "light": 0.85}
WORDS = ("", "nothing", *COLOURS, *SHAPES, *GROUNDS)
ID = {word: number for number, word in enumerate(WORDS)}


def outline(shape: int, dx: Tensor, dy: Tensor) -> Tensor:
    """Which places, so far from its middle, a shape covers."""
    near, far = torch.minimum(dx.abs(), dy.abs()), torch.maximum(dx.abs(), dy.abs())
    covers = (far <= RADIUS, dx**2 + dy**2 <= RADIUS**2 + 1, (near <= 1) & (far <= RADIUS), (far <= RADIUS) & (far > 1))
    return covers[shape]


def things(shape: int) -> Tensor:
    """What a shape covers of its half wherever it may stand, `[places 16 8]`."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(HALF), indexing="ij")
    rows, cols = torch.arange(RADIUS, SIDE - RADIUS), torch.arange(RADIUS, HALF - RADIUS)
    row, col = (place.flatten()[:, None, None] for place in torch.meshgrid(rows, cols, indexing="ij"))
    return outline(shape, x - col, y - row)


def draw(count: int, by: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures from -1 to 1 `[n 3 16 16]`, their words `[n 5]`, and where each thing stands `[n 2 16 16]`.

    The words are colour and shape of what is on the left, of what is on the right, and the ground. A half in four is
    empty, and two words say so.
    """

    def pick(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=by)

    colour, shape, ground = pick(len(COLOURS), count, 2), pick(len(SHAPES), count, 2), pick(len(GROUNDS), count)
    place, there = pick(PLACES, count, 2), torch.rand(count, 2, generator=by) < 0.75
    return painted(colour, shape, place, there, ground)


def painted(
    colour: Tensor, shape: Tensor, place: Tensor, there: Tensor, ground: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of what is chosen: of either thing `[n 2]` colour, shape, where, and whether; and the ground `[n]`."""
    every = torch.stack([things(kind) for kind in range(len(SHAPES))])  # [shapes places 16 8]
    count = len(ground)
    half = every[shape, place] & there[..., None, None]
    covered = torch.zeros(count, 2, SIDE, SIDE, dtype=torch.bool)
    covered[:, 0, :, :HALF], covered[:, 1, :, HALF:] = half[:, 0], half[:, 1]
    paint = torch.tensor(list(COLOURS.values()))[colour]
    picture = torch.tensor(list(GROUNDS.values()))[ground][:, None, None, None].expand(count, 3, SIDE, SIDE)
    for side in (0, 1):
        picture = torch.where(covered[:, side, None], paint[:, side, :, None, None], picture)
    words = torch.where(there[..., None], torch.stack([colour + ID["red"], shape + ID["square"]], -1), ID["nothing"])
    return picture * 2 - 1, torch.cat([words.flatten(1), ground[:, None] + ID["dark"]], 1), covered
