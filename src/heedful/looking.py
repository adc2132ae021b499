"""Where a prompt's last token looks in a picture, and what a picture gives words, under whatever stands beside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import ModelError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat, Sum

PICTURE = "image"  # the role of the picture's tokens in a prompt
THINGS = "things"  # the role of the words of each thing in a scene, a span each
CONTEXT = "context"  # that of its words, where attention is over both at once


class Looks(Method, abstract=True):
    """What the last token so far gives to each of the picture's, `[b places]`: the mean over heads and layers.

    Entries that a cache has lost get nothing. An encoder's own layers do not count.
    """

    def idle(self, call: Call) -> bool:
        return not call.causal

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Cat:
        given = weights[:, :, -1].float()  # [b h k]
        numbers = call.spread(call.numbers(PICTURE)).expand_as(given)
        places = given.new_zeros(*given.shape[:2], 1 + call.regions(PICTURE)[0].tokens)
        found = places.scatter_add(-1, numbers + 1, given)[..., 1:].mean(1)  # what is no place of the picture is first
        return Cat.of(f"{call.forward:09d} {call.rows.start:09d}", found)

    def answer(self, readings: Readings) -> Tensor:
        return torch.stack([stat.value[-1] for stat in readings.values()]).mean(0)


LOOKS = Looks()


class WordShares(Method, abstract=True):
    """What the picture gives each word, the mean over heads; of a batch its last row, which the text guides."""

    paper = Paper(
        "",
        "What the DAAM: Interpreting Stable Diffusion Using Cross Attention",
        "Raphael Tang, Linqing Liu, Akshat Pandey, Zhiying Jiang, Gefei Yang, Karun Kumar, Pontus Stenetorp, "
        "Jimmy Lin, Ferhan Ture",
        2023,
        "2210.04885",
        "ACL 2023",
        differs=(
            "Maps are shares of attention, the mean over layers, heads and steps, where the authors add them up.",
        ),
    )

    def __repr__(self) -> str:
        return "the maps of words"

    def idle(self, call: Call) -> bool:
        return not (call.cross or set(call.roles) >= {PICTURE, CONTEXT})

    def shares(self, weights: Tensor, call: Call) -> Tensor:
        found = weights[-1].float().mean(0)  # [q k]
        if call.cross:
            return found
        return found[call.marked_queries(PICTURE)[-1, 0]][:, call.marked(CONTEXT)[-1, 0]]


class WordPlaces(WordShares):
    """What each place gives each word, added up over forwards, `[places words]`."""

    whole_map = True

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of(self.shares(weights, call))


WORD_PLACES = WordPlaces()


def one_size(maps: list[Tensor]) -> Tensor:
    """The mean of maps `[words rows columns]` of unlike sizes, in the largest of these."""
    size = max((tuple(x.shape[1:]) for x in maps), key=math.prod)
    large = [torch.nn.functional.interpolate(x[None], size, mode="bilinear", align_corners=False)[0] for x in maps]
    return torch.stack(large).mean(0)


def grid(found: Tensor, tall: float, layer: str) -> Tensor:
    """Shares `[places words]` as maps `[words rows columns]`, rows and columns in the picture's proportion."""
    rows = max(1, round(math.sqrt(len(found) * tall)))
    columns = len(found) // rows
    if rows * columns != len(found) or abs(rows - columns * tall) >= max(1, tall):  # either may be rounded
        raise ModelError(
            f"{layer}: its {len(found)} places are no grid of the picture's proportion, {tall:.3g} to 1, so what "
            "they give words is no map"
        )
    return found.T.unflatten(1, (rows, -1))


def word_places(found: Mapping[int, Sum], tall: float, names: Sequence[str]) -> Tensor:
    """What a picture of that proportion gives each word, `[words rows columns]`: the mean over layers."""
    return one_size([grid(stat.total.float(), tall, names[layer]) for layer, stat in found.items()])
