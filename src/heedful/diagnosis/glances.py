"""The view of images: what heads look at in a few of them, whole maps for chosen heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Head, shrunk
from heedful.core.kinds.conversion import Progress
from heedful.core.method import Method
from heedful.core.regions import Region
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean, Statistic
from heedful.diagnosis.view import Attended, notable

if TYPE_CHECKING:
    from heedful.diagnosis.profile import Profile
    from heedful.diagnosis.subject import Subject
    from heedful.diagnosis.texts import Windows

CELLS = 576  # places of an image at most; where there are more patches, squares of them are one
MOST_IMAGES, MOST_HEADS = 4, 8
MAPS = 3_000_000  # numbers of whole maps at most
SIDE = 256  # pixels of an image's longer side at most


@dataclass(frozen=True, eq=False)
class ImageView:
    """A few images, and where heads look in them. Tokens before the patches come first, then places row by row."""

    names: list[str]  # of the images
    before: list[str]  # what the tokens before the patches are
    grid: list[int]  # rows and columns of places
    heads: list[Head]  # those of `maps`
    layers: list[int]  # those of `looks`
    pixels: Tensor  # float16 [images c rows cols], as the model gets them
    looks: Tensor  # float16 [2 images layers h n]: what the first token looks at, and all in the mean; nan: no head
    maps: Tensor  # float16 [m heads n n]: whole, of the first m images

    def __post_init__(self) -> None:
        n = len(self.before) + self.grid[0] * self.grid[1]
        shapes = self.looks.shape[:3], self.looks.shape[-1], self.maps.shape[1:]
        good = (2, len(self.names), len(self.layers)), n, (len(self.heads), n, n)
        if shapes != good or len(self.pixels) != len(self.names) or len(self.maps) > len(self.names):
            raise FieldError(self, "looks", shapes, f"must be those of {n} places", good)


def places(region: Region) -> tuple[Tensor, tuple[int, int]]:
    """The place of each of an image's tokens `[n]`, and how many rows and columns of places there are."""
    rows, cols = region.grid or (1, 1)
    side = 1
    while -(-rows // side) * -(-cols // side) > CELLS:
        side += 1
    across = -(-cols // side)
    before = region[0][0]
    at = torch.arange(rows)[:, None] // side * across + torch.arange(cols) // side
    return torch.cat([torch.arange(before), before + at.flatten()]), (-(-rows // side), across)


class Glances(Method):
    """How much each place of one image gives to each other, for every head."""

    paper = Attended.paper
    tokens: int  # that the image has

    def idle(self, call: Call) -> bool:
        return call.cross or "patches" not in call.roles

    @reads(Site.PATTERN, first="tokens")
    def look(self, weights: Tensor, call: Call) -> Statistic:
        place = places(call.region("patches"))[0].to(weights.device)
        n = int(place[-1]) + 1
        weights = weights[0].float()
        rows = place[call.rows]
        by_key = weights.new_zeros(*weights.shape[:2], n).index_add_(2, place[call.keys.index[0, 0]], weights)
        total = weights.new_zeros(len(weights), n, n).index_add_(1, rows, by_key)
        return Mean.of(total, rows.bincount(minlength=n)[:, None])

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: stat.value.half() for layer, stat in readings.items()}  # [h n n]


def chosen(notable: list[Head], found: Mapping[int, Tensor]) -> list[Head]:
    """The heads to show: half of them by their roles, and the first of the last layer, which says what is passed on."""
    last = max(found)
    known = [(n, h) for n, h in notable if n in found]
    more = [(last, h) for h in range(len(found[last])) if (last, h) not in known]
    return sorted([*known, *more[: MOST_HEADS - len(known)]])


def room(places: int, heads: int) -> int:
    """Of how many images whole maps are kept."""
    return max(1, min(MOST_IMAGES, MAPS // (heads * places**2)))


def look(
    subject: Subject, windows: Windows, profile: Profile, before: list[str], grid: tuple[int, int]
) -> ImageView | None:
    """The view of the first images that have the shape of the first; None where layers do not see an image whole."""
    rows = [n for n, row in enumerate(windows.tokens) if row.shape == windows.tokens[0].shape][:MOST_IMAGES]
    pixels = [windows.tokens[n] for n in rows]
    tokens = subject.count(pixels[0])
    found = []
    for done, row in enumerate(pixels, 1):
        found.append(subject.shown(Glances(tokens), row))
        subject.report(Progress("view", tokens * done, tokens * len(pixels)))
    if not found[0]:
        return None
    heads = chosen(notable(profile.roles(), 0, 0, MOST_HEADS // 2), found[0])
    with torch.autocast("cpu", enabled=False):  # which knows no types as narrow as some of these
        return view_of(found, heads, pixels, [windows.names[n] for n in rows], before, grid)


def view_of(
    found: Sequence[Mapping[int, Tensor]],
    heads: list[Head],
    pixels: Sequence[Tensor],
    names: list[str],
    before: list[str],
    grid: tuple[int, int],
) -> ImageView:
    """The view of these images, from what `Glances` tells of each."""
    layers = sorted(found[0])
    widest = max(len(maps) for maps in found[0].values())

    def even(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, widest - len(x)), value=torch.nan)

    ways = [
        torch.stack([torch.stack([even(way(maps[i])) for i in layers]) for maps in found])
        for way in (lambda x: x[:, 0], lambda x: x.float().mean(1).half())
    ]
    whole = found[: room(len(before) + grid[0] * grid[1], len(heads))]
    maps = torch.stack([torch.stack([maps[i][h] for i, h in heads]) for maps in whole])
    small = shrunk(torch.stack([one.float() for one in pixels]), SIDE).half()
    return ImageView(names, before, list(grid), heads, layers, small, torch.stack(ways), maps)
