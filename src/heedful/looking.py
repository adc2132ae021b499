"""Where the last token of a prompt looks in a picture, under whatever is attached beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat

PICTURE = "image"  # the role of the picture's tokens in a prompt


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
