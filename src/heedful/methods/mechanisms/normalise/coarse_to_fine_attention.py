"""p(j) = p(cell) p(j | cell): a sparsemax over cells, by their mean scores, and a softmax within each that is left."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.authoring import Call, Method, Paper, PositiveInt, Site, at
from heedful.core.flags import numbers, traced, zeroed
from heedful.core.positions import spread_heads
from heedful.methods.mechanisms.normalise._grouped import Groups


class CoarseToFineAttention(Method):
    """Cells of an image, or stretches of a text, compete first; most have no weight. For models trained with it."""

    paper = Paper(
        "P227",
        "Image-to-Markup Generation with Coarse-to-Fine Attention",
        "Yuntian Deng, Anssi Kanervisto, Jeffrey Ling, Alexander M. Rush",
        2017,
        "1609.04938",
        "ICML 2017",
        differs=(
            "The paper's full text was not at hand: that weights are a cell's times those in it is told by its "
            "abstract and others' summaries.",
            "A cell is scored by the mean of the scores of its keys, which is the score of their mean; the authors "
            "score features of a coarser grid, made by further convolutions, with weights of their own.",
            "Sparsemax alone: the paper's other way, one cell drawn and taught by REINFORCE, is not here.",
            "It acts wherever there is attention, where the authors have a recurrent decoder that looks at an image.",
            "Tokens outside the grid of patches, as a class token, are cells by themselves.",
            "Scores in cells without weight are computed all the same; what skipping them saves is not saved here.",
        ),
    )
    subjects = ("text", "image")
    side: PositiveInt = 4  # patches along each side of a cell, or a text's tokens in one; the paper: 4

    @classmethod
    def example(cls) -> CoarseToFineAttention:
        return cls(3)

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        seen = scores.new_ones(scores.shape[-1], dtype=torch.bool) if call.keep is None else call.keep
        seen = seen.expand_as(scores)
        cells, order = spread_heads(self._cells(call), call.heads).sort(dim=-1)
        counted = pad(cells.diff(dim=-1).ne(0), (1, 0)).cumsum(-1)
        groups = Groups.of(torch.zeros_like(order).scatter(-1, order, counted)[..., None, :])
        counts, sums = (groups.sums(x) for x in (numbers(seen, scores), zeroed(scores, seen)))
        return self.within(scores, seen, groups, self.across(sums / counts.clamp(min=1), counts > 0))

    def across(self, means: Tensor, held: Tensor) -> Tensor:
        """The weights of cells by their mean scores `[b h r m]`, of those that hold a key that is seen."""
        return sparsemax(means, held)

    def within(self, scores: Tensor, seen: Tensor, groups: Groups, of_cell: Tensor) -> Tensor:
        """The weights of keys `[b h r k]`, of which each has a share of its cell's."""
        return groups.softmax(scores, seen, of_cell)

    def _cells(self, call: Call) -> Tensor:
        """A number for the cell that each key lies in, `[b|1 g|1 k]`."""
        grid = getattr(call.roles.get("patches"), "grid", None)
        if grid is None or len(grid) != 2:
            return call.k_pos // self.side
        place = call.coordinates("patches")[1]
        cell = place[..., 0] // self.side * grid[1] + place[..., 1] // self.side
        return torch.where(place[..., 0] < 0, ~call.k_pos, cell)  # below zero, and so no cell of the grid


def sparsemax(x: Tensor, among: Tensor) -> Tensor:
    """The distribution nearest to some entries of each row, which is zero for all that are low; and for the others."""
    top = x.detach().masked_fill(~among, torch.finfo(x.dtype).min).amax(-1, keepdim=True)
    x = torch.where(among, x - top, -2.0)  # one less than the highest is always too low
    left = x.detach() > -1
    for _ in range(x.shape[-1]):  # each time one goes at least, and mostly so many that a few times are enough
        fewer = left & (x.detach() > _level(x.detach(), left))
        if not traced(x) and torch.equal(fewer, left):
            break
        left = fewer
    return (x - _level(x, left)).clamp(min=0)


def _level(x: Tensor, left: Tensor) -> Tensor:
    """What those that are left would lose each to add up to one; it is too low while some of them lie below it."""
    return (x.where(left, 0.0).sum(-1, keepdim=True) - 1) / numbers(left, x).sum(-1, keepdim=True).clamp(min=1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, CoarseToFineAttention(2)) as run:
        print(run.difference(**inputs))
