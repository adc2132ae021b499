"""Frames d apart see bands |p - q| <= 2^(bits(s) - bits(d)), s their size; those under a block are wider and rarer."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from heedful.authoring import Call, FieldError, Mask, Method, Paper, PositiveFloat, PositiveInt, Share, Site, at
from heedful.kit.chosen import Chosen


class RadialAttention(Method):
    """A mask for video that thins out with the distance in time, so that pairs grow as n log n; nothing is looked at.

    The role `patches` needs a grid whose first axis is time: `roles={"patches": Region(((0, 4800),), (8, 20, 30))}`.
    Dense steps at the start of a generation are `.when(steps=...)`, dense layers `.on(layers=...)`.
    """

    paper = Paper(
        "P249",
        "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
        "Xingyang Li, Muyang Li, Tianle Cai, Haocheng Xi, Shuo Yang, Yujun Lin, Lvmin Zhang, Songlin Yang, Jinbo Hu, "
        "Kelly Peng, Maneesh Agrawala, Ion Stoica, Kurt Keutzer, Song Han",
        2025,
        "2506.19852",
        "NeurIPS 2025",
        differs=(
            "Pairs are kept one by one as the bands of the authors' code say; their kernel then rounds these to whole "
            "blocks. Where a frame's size is a power of two, these bands are one token wider to either side than the "
            "paper's formula, else they go by the power below; and none is thinner than a block.",
            "All see the first frame, as in the paper; the authors' code does without it for HunyuanVideo.",
            "Tokens outside the grid, as those of a text, see everything and are seen by all.",
            "The authors' fine-tuning for longer videos is not here.",
        ),
    )
    subjects = ("image",)
    every_token = True
    block: PositiveInt = 128  # tokens: no band is thinner; the authors: 128
    # on the width of bands of frames 2 and more apart; the paper: 1, scripts 0.95, for Wan 0.2
    decay: PositiveFloat = 1.0
    beside: Share = 1.0  # width of the band between neighbouring frames, in frames; the paper: 1, for Wan at first 0.5

    @classmethod
    def example(cls) -> RadialAttention:
        return cls(block=1, decay=0.25, beside=0.25)

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        grid = call.region("patches").grid
        if grid is None or len(grid) < 2:
            rule = "must lie on a grid of time and one or more axes of space"
            raise FieldError(self, "patches", grid, rule, "roles={'patches': Region(((0, 4800),), (8, 20, 30))}")
        places = call.places
        return mask & Chosen(lambda rows: self._near(places.tile(rows, slice(None)), grid))

    def _near(self, call: Call, grid: tuple[int, ...]) -> Tensor:
        """Which keys each query sees, `[b|1 1 r k]`."""
        (q_time, q_place, q_off), (k_time, k_place, k_off) = (_placed(x, grid) for x in call.coordinates("patches"))
        width = self._widths(grid[0], prod(grid[1:])).to(q_time.device)
        apart = (q_time[..., :, None] - k_time[..., None, :]).abs()
        near = (q_place[..., :, None] - k_place[..., None, :]).abs() <= width[apart]
        return near | (k_time == 0)[..., None, :] | q_off[..., :, None] | k_off[..., None, :]

    def _widths(self, frames: int, size: int) -> Tensor:
        """Half the width of the band between frames that lie so far apart, `[frames]`; below 0 where there is none."""
        out = []
        for apart in range(frames):
            length = 2.0 ** (size.bit_length() - apart.bit_length())
            rare = apart % max(1, int(self.block / length))
            wide = (
                size if apart == 0 else int(self.beside * size) if apart == 1 else max(length * self.decay, self.block)
            )
            out.append(-1.0 if rare else float(wide))
        return torch.tensor(out)


def _placed(at: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The frame of each token, its place in the frame, and whether it is off the grid."""
    off, at = at[..., 0] < 0, at.clamp(min=0)
    place = at[..., 1]
    for axis, side in enumerate(grid[2:], start=2):
        place = place * side + at[..., axis]
    return at[..., 0], place, off


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)  # rows of patches as frames
    with attach(model, RadialAttention(block=2)) as run:
        print(run.difference(**inputs))
