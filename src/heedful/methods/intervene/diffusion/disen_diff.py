"""sum over things of 1 - IoU(A_new, A_class) + IoU(A_class, A_class'), beside the loss that teaches new words."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat
from heedful.methods.intervene.diffusion._map_loss import MapLoss, PictureGrid, levelled, smoothed

ONE = 1.0  # beside both areas, as the authors have it


class DisenDiff(MapLoss):
    """Trains new words to look where the words for their things' kinds look, and those to look at places of their own.

    Every thing is a role that names a new word and the word for its kind, one behind the other, as in "a <new> cat".
    The penalty is `run.loss()`, to add to the loss of what is denoised. A role's first two tokens count, and texts that
    name none of the things are left out.
    """

    paper = Paper(
        "P274",
        "Attention Calibration for Disentangled Text-to-Image Personalization",
        "Yanbing Zhang, Mengping Yang, Qin Zhou, Zhe Wang",
        2024,
        "2403.18551",
        "CVPR 2024",
        differs=(
            "Settings are those of the authors' code; of three things it separates all pairs, as that does.",
            "Maps of one number of places are averaged; the authors take those of 16 x 16, or enlarge others.",
            "The loss of what is denoised is the caller's.",
        ),
    )
    things: tuple[str, ...] = ("first", "second")  # roles, each of a new word and of the word for its kind
    weight: NonNegativeFloat = 0.01  # beside the loss of what is denoised; the authors: 0.01
    grid: PictureGrid | None = None  # rows and columns of the picture, for maps to be smoothed; None: they are not

    def __post_init__(self) -> None:
        if len(set(self.things)) < 2 or len(set(self.things)) < len(self.things):
            raise FieldError(self, "things", self.things, "must name two or more roles", ("first", "second"))

    @classmethod
    def example(cls) -> DisenDiff:
        return cls(things=("marked", "bos"), weight=1.0)

    def loss(self, maps: Tensor, call: Call) -> Tensor:
        level = smoothed(self, levelled(maps), self.grid)
        new, kind = zip(*(self._words(level, call, thing) for thing in self.things), strict=True)
        bound = [1 - _overlap(mine, own.detach()) for mine, own in zip(new, kind, strict=True)]
        pairs = [_overlap(one, other) for one, other in combinations(kind, 2)]
        there = [(call.numbers(thing)[:, 0] >= 0).any(-1).expand(len(maps)) for thing in self.things]
        named = torch.stack(there).any(0)
        each = (torch.stack(bound).sum(0) + torch.stack(pairs).mean(0)) * named
        return self.weight * each.sum() / named.sum().clamp(min=1)

    def _words(self, maps: Tensor, call: Call, thing: str) -> tuple[Tensor, Tensor]:
        """The map of a thing's new word and the square of that of its kind, `[b n]` each."""
        number = call.numbers(thing)[:, 0].expand(len(maps), -1)
        new, kind = ((maps * (number == i)[:, None]).sum(-1) for i in (0, 1))
        return new, kind.square()


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of maps `[b n]`, `[b]`."""
    both = (one * other).sum(-1)
    return (both + ONE) / ((one + other).sum(-1) - both + ONE)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 12))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    with attach(model, DisenDiff(weight=1.0), roles={"first": ((2, 4),), "second": ((6, 8),)}) as run:
        for _ in range(4):
            loss = run(input_ids=ids, decoder_input_ids=ids, labels=ids).loss  # the penalty is in it
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            print(loss.item(), run.loss().item())
