"""Mean over patches q of A_q,q+o / sum_p A_qp: where each head looks from a patch, others placed around it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.figures import (
    Curves,
    Description,
    Finding,
    Grid,
    Head,
    HeadMap,
    Listing,
    Role,
    counted,
    head_name,
    percent,
)
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, ProperShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean, Statistic

NEIGHBOURS = {
    (-1, -1): "above and to the left",
    (-1, 0): "above",
    (-1, 1): "above and to the right",
    (0, -1): "to the left",
    (0, 1): "to the right",
    (1, -1): "below and to the left",
    (1, 0): "below",
    (1, 1): "below and to the right",
}


@dataclass(frozen=True, eq=False)
class Aligned:
    """Where heads look from a patch; nan for heads that a layer does not have."""

    layers: tuple[int, ...]
    around: Tensor = field(repr=False)  # [layers h 2r+1 2r+1]: share of each offset, rows down; the middle is the patch
    distance: Tensor = field(repr=False)  # [layers h]: mean distance, on an image whose sides are 1
    centre: Tensor = field(repr=False)  # [layers h 2]: mean offset, down and to the right, on such an image
    even: Tensor = field(repr=False)  # [layers h]: the distance of attention spread evenly over the patches it may see
    share: float = 0.0

    @property
    def heads(self) -> dict[Head, tuple[tuple[int, int], float]]:
        """The offset-local heads: which neighbour each looks at, and with how much, strongest first."""
        reach, found = self.around.shape[-1] // 2, {}
        high, at = self.around.nan_to_num(-1.0).flatten(2).max(-1)
        for n, h in (high >= self.share).nonzero().tolist():
            offset = divmod(int(at[n, h]), 2 * reach + 1)
            offset = offset[0] - reach, offset[1] - reach
            if offset in NEIGHBOURS:
                found[self.layers[n], h] = offset, float(high[n, h])
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def wide(self) -> dict[Head, float]:
        """The heads that look at least as far as even attention would, and how far, furthest first."""
        at = (self.distance >= self.even).nonzero().tolist()
        found = {(self.layers[n], h): float(self.distance[n, h]) for n, h in at}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        named = [
            f"{head_name(*head)} {NEIGHBOURS[at]} {share:.0%}" for head, (at, share) in list(self.heads.items())[:8]
        ]
        return f"{len(self.heads)} offset-local heads: {', '.join(named) or 'none'}"


class OffsetLocalHeads(Method):
    """Heads of a vision model that look at one neighbour of each patch, and how far each head looks."""

    paper = Paper(
        "P181",
        "Teaching Matters: Investigating the Role of Supervision in Vision Transformers",
        "Matthew Walmer, Saksham Suri, Kamal Gupta, Abhinav Shrivastava",
        2023,
        "2212.03862",
        "CVPR 2023",
        differs=(
            "The aligned map is kept for offsets of at most `reach` patches; the authors keep all of it, and the mean "
            "distance and offset are of all of it here too.",
            "Offsets are measured on an image whose sides are 1, as the authors' are, and an image need not be square.",
            "The authors show such heads in their maps; that a head is one from a share at its highest offset on, "
            "which must be one of eight neighbours, is ours, and so is that one is wide which looks as far as even "
            "attention would.",
            "Every token before the patches is left out, registers too, and padded queries.",
            "Their comparisons of features between models, and of downstream tasks, are not here.",
        ),
    )
    subjects = ("image",)
    reach: PositiveInt = 3  # patches to each side that are told one by one
    share: ProperShare = 0.1  # of its attention to patches that a head gives one neighbour to be called offset-local

    def idle(self, call: Call) -> bool:
        return call.cross or "patches" not in call.roles

    @reads(Site.PATTERN)
    def align(self, weights: Tensor, call: Call) -> Statistic | None:
        grid = call.region("patches").grid
        if grid is None or len(grid) != 2:
            return None
        b, h, r, _ = weights.shape
        # as a rule all heads have the same places, [1 1 n 2], and what follows from these is computed once
        q, k = (x if x.shape[1] == 1 else call.spread(x) for x in call.coordinates("patches"))
        among = call.is_text & (q[..., 0] >= 0)
        seen = True if call.keep is None else call.keep
        pairs = (among[..., None] & (k[..., 0] >= 0)[:, :, None] & seen).to(weights.dtype)
        weights, even = (x / x.sum(-1, keepdim=True).clamp(min=1e-30) for x in (weights.detach() * pairs, pairs))
        away = k[:, :, None] - q[:, :, :, None]  # [b|1 h|1 r k 2]
        near = (away.abs() <= self.reach).all(-1)
        side = 2 * self.reach + 1
        at = (away[..., 0] + self.reach) * side + away[..., 1] + self.reach
        at = torch.where(near, at, side**2).expand_as(weights)  # what is further away falls into a slot of its own
        around = weights.new_zeros(b, h, side**2 + 1).scatter_add_(-1, at.flatten(2), weights.flatten(2))[..., :-1]
        down, right = (x.to(weights.dtype) / max(1, n - 1) for x, n in zip(away.unbind(-1), grid, strict=True))
        far = (down**2 + right**2).sqrt()
        plain = [(x * y).sum((-2, -1)) for x, y in ((weights, far), (weights, down), (weights, right), (even, far))]
        total = torch.cat([around, *(x.expand(b, h)[..., None] for x in plain)], -1).sum(0)
        return Mean.of(total, among.expand(b, h, r).sum((0, 2))[:, None])  # [h offsets+4]

    def answer(self, readings: Readings) -> Aligned:
        found = pad_sequence([stat.value for stat in readings.values()], True, float("nan"))
        around = found[..., :-4].unflatten(-1, (2 * self.reach + 1,) * 2)
        return Aligned(tuple(readings), around, found[..., -4], found[..., -3:-1], found[..., -1], self.share)

    def describe(self, answer: Aligned) -> Description:
        heads = answer.heads
        next_to = torch.stack([answer.around[..., self.reach + i, self.reach + j] for i, j in NEIGHBOURS], -1).amax(-1)
        what = "How far away the patches are that a head looks at, on an image whose sides are 1."
        far = HeadMap("patch_distance", "Attention distance", what, answer.layers, answer.distance, "score", low=0.0)
        what = "The share of its attention to patches that a head gives to that neighbour of each patch that gets most."
        beside = HeadMap("patch_neighbour", "Attention to one neighbour", what, answer.layers, next_to, low=0.0)
        what = "The mean, the nearest and the furthest head of each layer: early ones often see a part, late ones all."
        ways = {"furthest head": answer.distance.nan_to_num(-1).amax(1), "mean": answer.distance.nanmean(1)}
        ways["nearest head"] = answer.distance.nan_to_num(2).amin(1)
        curves = Curves("distance_depth", "Attention distance by layer", what, answer.layers, ways, "layer", "distance")
        roles, share = [], len(answer.wide) / int((~answer.distance.isnan()).sum())
        if answer.wide:
            what = "Looks at least as far as attention would that is spread evenly over the image."
            roles.append(Role("looks all over the image", what, answer.wide, "score"))
        first, last = (float(x) for x in answer.distance.nanmean(1)[[0, -1]])
        text = (
            f"On an image whose sides are 1, heads look {first:.2f} far in layer {answer.layers[0]} and {last:.2f} far "
            f"in layer {answer.layers[-1]}; even attention would look {float(answer.even.nanmean()):.2f} far, and "
            f"{percent(share)} of heads look as far or further."
        )
        findings = [Finding(text, 0.45, shows="patch_distance")]
        if not heads:
            text = f"No head gives {self.share:.0%} of its attention or more to one neighbour of each patch."
            return Description(
                (far, beside, curves), tuple(roles), (*findings, Finding(text, 0.1, shows="patch_neighbour"))
            )
        strongest = next(iter(heads))
        values = answer.around[answer.layers.index(strongest[0]), strongest[1]]
        names = [f"{n:+d}" if n else "0" for n in range(-self.reach, self.reach + 1)]
        what = (
            f"The share of its attention that head {head_name(*strongest)} gives to each patch's neighbours; the patch "
            "itself is in the middle, at 0 and 0."
        )
        grid = Grid(
            "offset_map", f"Around a patch, head {head_name(*strongest)}", what, values, names, names, "down", "right"
        )
        rows = [(head, NEIGHBOURS[at], f"{share:.0%}") for head, (at, share) in list(heads.items())[:10]]
        what = f"Heads whose attention to patches peaks at one neighbour of each, with {self.share:.0%} or more."
        listing = Listing(
            "offset_heads", "Heads that look at one neighbour", what, ("head", "looks at the patch", "share"), rows
        )
        role = Role(
            "looks at a neighbour", "Looks at one neighbour of each patch.", {n: x for n, (_, x) in heads.items()}
        )
        ways_looked: dict[str, int] = {}
        for at, _ in heads.values():
            ways_looked[NEIGHBOURS[at]] = ways_looked.get(NEIGHBOURS[at], 0) + 1
        told = ", ".join(f"{count} {way}" for way, count in ways_looked.items())
        few = "looks" if len(heads) == 1 else "look"
        text = f"{counted(len(heads), 'head')} {few} at one neighbour of each patch more than anywhere else: {told}."
        return Description(
            (far, beside, curves, grid, listing),
            (role, *roles),
            (Finding(text, 0.5, shows="patch_neighbour"), *findings),
        )


if __name__ == "__main__":
    from heedful import attach, models

    model = models.vision().model
    with attach(model, OffsetLocalHeads()) as run:
        run(pixel_values=torch.randn(1, 3, 224, 224))
        print(run[OffsetLocalHeads()])
