"""Parts of an image's class token: do the patches that give it a thing's direction lie on the thing?"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from claims._scenes import average_precision, crop, flower, model, scenes
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import Call, Fitted, Method, Paper, Site, Statistic, reads
from heedful.core.stats import Cat
from heedful.methods import AttentionRollout, ImageDecomposition

SCENES, SHOWN = 12, 6  # pictures in which the thing is sought, and of each of the two things to tell them apart
LAST = 4  # layers whose parts are added up


class _Looks(Method):
    """What the class token of the last layer attends to, the mean of its heads."""

    paper = Paper("claims", "A control of heedful's own", "heedful", 2026, venue="heedful")
    tokens: int = 1

    def idle(self, call: Call) -> bool:
        return not call.last_layer

    @reads(Site.PATTERN, first="tokens")
    def look(self, weights: Tensor, call: Call) -> Statistic:
        return Cat.of(f"{call.forward:06d}", weights[:, :, 0].mean(1))


class _Stream(Method):
    """The class token's stream before the last norm."""

    paper = _Looks.paper

    def idle(self, call: Call) -> bool:
        return not call.last_layer

    @reads(Site.RESIDUAL)
    def leave(self, stream: Tensor, call: Call) -> Statistic:
        return Cat.of(f"{call.forward:06d}", stream[:, 0])


@cache
def _maps() -> ImageDecomposition:
    return fit(ImageDecomposition(LAST), model(), ())


@torch.no_grad()
def _direction(draw: torch.Generator) -> Tensor:
    """From the mean of palaces to that of flowers, `[1 e]`."""
    shown = [flower(draw) for _ in range(SHOWN)] + [crop("china", draw, 200, 400) for _ in range(SHOWN)]
    with attach(model(), _Stream()) as seen:
        seen(pixel_values=torch.stack(shown))
        (streams,) = seen[_Stream()].values_by_layer
    flowers, palaces = torch.cat(streams).split(SHOWN)
    return (flowers.mean(0) - palaces.mean(0))[None]


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = torch.Generator().manual_seed(seed)
    pictures, covered = scenes(draw, SCENES)
    parts = ImageDecomposition(LAST, directions=Fitted({"d": _direction(draw)}), maps=_maps().maps)
    with attach(model(), parts | _Looks() | AttentionRollout()) as seen:
        seen(pixel_values=pictures)
        maps = {"parts": seen[parts].map[..., 0]}
        maps["attention"] = torch.cat(seen[_Looks()].values_by_layer[0])
        maps["rollout"] = seen[AttentionRollout()][0][:, 0]
    numbers = {}
    for name, each in maps.items():
        found = [average_precision(x[1:], where) for x, where in zip(each, covered, strict=True)]
        numbers[f"average precision, {name}"] = sum(found) / SCENES
    other = max(numbers["average precision, attention"], numbers["average precision, rollout"])
    return numbers["average precision, parts"] - other, numbers


CLAIM = Claim(
    key="P133",
    method="ImageDecomposition",
    says="Patches that give an image's vector a thing's direction are that thing, more than those attended to are.",
    paper_number="best zero-shot segmentation of ImageNet-Segmentation by CLIP, above attention, rollout and others",
    setup=f"DINOv2-S/14, which knows no texts; {SCENES} crops of one photograph a seed, each with a disc of a flower "
    f"from another; the direction is that from the mean class token of {SHOWN} crops of the first to that of {SHOWN} "
    f"views of the flower, before the last norm; parts of the last {LAST} layers. Against the class token's attention "
    "in the last layer, mean of heads, and rollout, whichever is better.",
    effect="average precision of patches above the better map",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
