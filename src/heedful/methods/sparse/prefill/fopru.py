"""Patches, or rows of them, of the highest significance: the mean of what each gets, or gives, in a late layer."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.kit.picked import PickedPatches, best


class FoPru(PickedPatches):
    """Shows a language model the patches that matter most to the image's encoder, in their own order.

    Of the mean weight that a patch gets from all patches and the mean that it gives to them, that counts which differs
    more from patch to patch.
    """

    paper = Paper(
        "P198",
        "FoPru: Focal Pruning for Efficient Large Vision-Language Models",
        "Lei Jiang, Weizhe Huang, Tongxuan Liu, Yuting Zeng, Jing Li, Lechao Cheng, Xiaohua Xu",
        2024,
        "2411.14164",
        "arXiv",
        differs=(
            "The authors' text was not at hand: this follows a serving system's form of their method, which takes the "
            "one of two sums of the map that varies more.",
            "A patch that goes is seen by nobody behind the layer, and keeps its place, so that others keep theirs; "
            "the authors take it out before the language model, which is where memory and time are saved.",
            "The encoder's own later layers, if anything reads them, see the chosen patches alone as well.",
            "A share of the patches or of the rows is rounded up.",
        ),
    )
    by: Literal["token", "row"] = "token"  # what is ranked: each "token", or each "row" of the image's grid

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where = self.patches(call)
        found = significance(weights[:, :, where, where].mean(1))
        if self.by == "token":
            return best(found, ceil(self.share * found.shape[1]))
        grid = call.region("patches").grid
        if grid is None or len(grid) != 2:
            rule = "must have a grid of rows and columns, for its rows to be ranked"
            raise FieldError("attach()", "roles", grid, rule, {"patches": "Region(((1, 257),), (16, 16))"})
        rows, cols = grid
        kept = best(torch.einsum("brc->br", found.unflatten(1, grid)), ceil(self.share * rows))
        return kept.repeat_interleave(cols, 1)


def significance(weights: Tensor) -> Tensor:
    """Of each patch `[b p]`, from what patches give each other `[b p p]`."""
    received, given = weights.mean(1), weights.mean(2)
    more = received.var(-1, keepdim=True) > given.var(-1, keepdim=True)
    return received.where(more, given)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for by in ("token", "row"):
        with attach(model, FoPru(layer=0, by=by)) as run:
            print(by, run.difference(**inputs))
