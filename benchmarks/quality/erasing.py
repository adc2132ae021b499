"""Scenes out of which a thing is taken, drawn by the small denoiser: is the ground left where it stood?"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.core.kinds.tokens import Prompt
from heedful.models.small_denoiser import LENGTH, PATCH
from heedful.models.two_things import PLACES, SIDE, painted
from heedful.tasks import Scene
from heedful.tasks.scenes import PICTURES, TwoThings, unclean

START = 0.8  # how much noise the picture is begun with


@dataclass(frozen=True, eq=False)
class Erasing(Scene):
    """A scene that knows the picture it is begun with."""

    picture: Tensor  # [1 3 16 16]
    plain: Tensor  # the noise in it
    gone: Tensor  # [1 1 16 16]: the patches that are drawn anew


class Erased(TwoThings):
    """What stands on the left is to go: there is no word, and all around its patches is put back after each step."""

    name = "erased"
    about = "Takes the thing on the left out of a picture: nothing is left of it."

    def scene(self, tokenizer: Any, draw: random.Random) -> Scene:
        by = torch.Generator().manual_seed(draw.getrandbits(62))
        picture, _, covered = pictures(1, by, torch.ones(1, 2, dtype=torch.bool))
        noise = torch.randn(1, 3, SIDE, SIDE, generator=by)
        patches = F.max_pool2d(covered.float(), PATCH)[0]  # those that hold any of either thing
        places = [part.flatten().nonzero().flatten().tolist() for part in patches]
        marked, other = (tuple((place, place + 1) for place in each) for each in places)
        roles = {"marked": marked, "other": other}
        gone = F.interpolate(patches[None, :1], scale_factor=PATCH)
        begun = (1 - START) * picture + START * noise
        return Erasing(Prompt((0,) * LENGTH), (0,), begun, picture, noise, gone, roles=roles)

    def step(self, scene: Any, model: Any, x: Tensor, number: int) -> Tensor:
        now, then = (START * (1 - n / self.steps) for n in (number, number + 1))
        context = model.words.weight[torch.tensor([scene.prompt.tokens], device=x.device)] + model.places
        t = torch.full((len(x),), now, device=x.device)
        found = model(noised=x, t=t, context=context.expand(len(x), -1, -1))
        around = ((1 - then) * scene.picture + then * scene.plain).to(x)
        return torch.where(scene.gone.to(x) > 0, x + (then - now) * found, around)

    def judge(self, pictures: Tensor) -> Tensor:
        return super().judge(pictures)[:, :1]

    def real(self, model: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Pictures on whose left there is nothing in half the cases, as unclean as drawn ones are."""
        drawn, _ = super().real(model, tokenizer)
        by = torch.Generator().manual_seed(1)
        there = torch.rand(PICTURES, 2, generator=by) < 0.5
        clean, kinds, _ = pictures(PICTURES, by, there)
        return clean.to(drawn) + unclean(drawn), torch.where(there, kinds, 0)[:, :1].to(drawn.device)


def pictures(count: int, by: torch.Generator, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, the numbers of the things in them `[n 2]`, and where each stands `[n 2 16 16]`."""
    colour, shape = (torch.randint(4, (count, 2), generator=by) for _ in range(2))
    place, ground = torch.randint(PLACES, (count, 2), generator=by), torch.randint(3, (count,), generator=by)
    picture, _, covered = painted(colour, shape, place, there, ground)
    return picture, 1 + shape * 4 + colour, covered
