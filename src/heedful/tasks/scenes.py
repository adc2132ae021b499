"""Scenes of two coloured things, drawn by the small denoiser that comes along and judged without a network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from heedful.adapters.wrapped import device_of
from heedful.core.errors import RefusedModel
from heedful.core.kinds.tokens import Prompt
from heedful.looking import THINGS
from heedful.models.small_denoiser import Denoiser
from heedful.models.two_things import COLOURS, GROUNDS, HALF, PLACES, SHAPES, SIDE, painted, things
from heedful.tasks._scene_words import SceneWords
from heedful.tasks._scenes import Scene, Scenes

KINDS = 1 + len(COLOURS) * len(SHAPES)  # of things, nothing the first
PICTURES = 100  # that judge the judge
ROLES = {"subjects": ((0, 4),), "first": ((0, 2),), "second": ((2, 4),), "ground": ((4, 5),), THINGS: ((0, 2), (2, 4))}


@cache
def halves() -> tuple[Tensor, Tensor, Tensor]:
    """Every half of a picture that can be, `[m 384]` from -1 to 1, what stands in it `[m]`, and its box `[m 16 8]`."""
    found, kinds, boxes = [], [], []
    for light in GROUNDS.values():
        found.append(torch.full((1, 3, SIDE, HALF), light))
        kinds.append(0)
        boxes.append(torch.zeros(1, SIDE, HALF))
        for shape in range(len(SHAPES)):
            covered = things(shape)
            for colour, paint in enumerate(COLOURS.values()):
                found.append(torch.where(covered[:, None], torch.tensor(paint)[:, None, None], light))
                kinds += [1 + shape * len(COLOURS) + colour] * PLACES
                boxes.append((covered.any(1, keepdim=True) & covered.any(2, keepdim=True)).float())
    return torch.cat(found).flatten(1) * 2 - 1, torch.tensor(kinds), torch.cat(boxes)


def _far(pictures: Tensor) -> Tensor:
    """How far each half of pictures is from every half that can be, `[b 2 m]`."""
    sides = torch.stack(pictures.split(HALF, -1), 1).flatten(2)
    return torch.cdist(sides, halves()[0].to(sides).expand(len(sides), -1, -1)).square()


def unclean(pictures: Tensor) -> Tensor:
    """What is left of pictures where the nearest that can be is taken away."""
    nearest = halves()[0].to(pictures)[_far(pictures).argmin(-1)]  # [b 2 384]
    return pictures - torch.cat(nearest.unflatten(-1, (3, SIDE, HALF)).unbind(1), -1)


def _read(model: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Prompts as the cross-attention sees them, `[b 5 e]`, without a call of the model's own parts."""
    table = model.words.weight
    found: Tensor = table[torch.tensor([prompt.tokens for prompt in prompts], device=table.device)] + model.places
    return found


class TwoThings(Scenes):
    """A thing on the left and another on the right, each by its colour and shape."""

    name = "scenes"
    about = "Draws two things by colour and shape, each in its half of the picture."
    model = "denoiser"

    def require(self, model: Any, tokenizer: Any) -> None:
        if not isinstance(model, Denoiser):
            raise RefusedModel(
                f"{self.name}: {type(model).__name__} is not the diffusion model that draws these, which comes along: "
                "'denoiser', or heedful.models.denoiser(); for scenes of another one subclass heedful.tasks.Scenes, as "
                "docs/vision.md shows"
            )

    def scene(self, tokenizer: Any, draw: random.Random) -> Scene:
        both = [(draw.choice(list(COLOURS)), draw.choice(SHAPES)) for _ in range(2)]
        asked = " ".join([*(f"{colour} {shape}" for colour, shape in both), draw.choice(list(GROUNDS))])
        right = [1 + SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour) for colour, shape in both]
        noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(draw.getrandbits(62)))
        return Scene(Prompt(tuple(tokenizer.encode(asked)), ROLES), tuple(right), noise)

    def step(self, scene: Scene, model: Any, x: Tensor, number: int) -> Tensor:
        return self._step(_read(model, [scene.prompt]), model, x, number)

    def _step(self, context: Tensor, model: Any, x: Tensor, number: int) -> Tensor:
        t = torch.full((len(x),), 1 - number / self.steps, device=x.device)
        found: Tensor = x - model(noised=x, t=t, context=context.expand(len(x), -1, -1)) / self.steps
        return found

    def judge(self, pictures: Tensor) -> Tensor:
        far = _far(pictures)
        kinds = halves()[1].to(far.device)
        scores = far.new_full((*far.shape[:-1], KINDS), -torch.inf)
        return scores.scatter_reduce(-1, kinds.expand_as(far), -far, "amax")

    def real(self, model: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Pictures of two things, over which lies what is unclean in as many that the model drew of other prompts."""
        by = torch.Generator().manual_seed(0)
        scenes = [self.scene(tokenizer, random.Random(f"{self.name} unclean {i}")) for i in range(PICTURES)]
        x = torch.cat([scene.noise for scene in scenes]).to(device_of(model))
        context = _read(model, [scene.prompt for scene in scenes])
        for number in range(self.steps):
            x = self._step(context, model, x, number)
        colour, shape = (torch.randint(4, (PICTURES, 2), generator=by) for _ in range(2))
        place, ground = torch.randint(PLACES, (PICTURES, 2), generator=by), torch.randint(3, (PICTURES,), generator=by)
        pictures, _, _ = painted(colour, shape, place, torch.ones(PICTURES, 2, dtype=torch.bool), ground)
        return pictures.to(x) + unclean(x), (1 + shape * len(COLOURS) + colour).to(x.device)


class TwoThingsWords(SceneWords, TwoThings):
    """The same pictures: are the words of either thing looked at from where it stands?"""

    name = "scene_words"
    about = "Draws the same, and looks at each thing's words most from its box."

    def boxes(self, pictures: Tensor) -> Tensor:
        """The box of what stands in the half that comes nearest, among all that can be."""
        whole = pictures.new_zeros(len(pictures), 2, SIDE, SIDE)
        found = halves()[2].to(pictures)[_far(pictures).argmin(-1)]  # [b 2 16 8]
        whole[:, 0, :, :HALF], whole[:, 1, :, HALF:] = found[:, 0], found[:, 1]
        return whole
