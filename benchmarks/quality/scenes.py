"""Scenes of two coloured things, drawn by the small denoiser of the claims and judged without a network."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from claims._pictures import COLOURS, GROUNDS, HALF, PLACES, SHAPES, SIDE, WORDS, Denoiser, painted, things
from heedful.core.errors import RefusedModel
from heedful.core.kinds import Prompt
from heedful.tasks import Scene, Scenes

KINDS = 1 + len(COLOURS) * len(SHAPES)  # of things, nothing the first
PICTURES = 100  # that judge the judge
ROLES = {"subjects": ((0, 4),), "first": ((0, 2),), "second": ((2, 4),), "ground": ((4, 5),)}


def speller() -> Any:
    """What makes tokens of the denoiser's words."""
    backend = Tokenizer(WordLevel({word or "<>": i for i, word in enumerate(WORDS)}, unk_token="<>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def halves() -> tuple[Tensor, Tensor]:
    """Every half of a picture that can be, `[m 384]` from -1 to 1, and what stands in it `[m]`."""
    found, kinds = [], []
    for light in GROUNDS.values():
        found.append(torch.full((1, 3, SIDE, HALF), light))
        kinds.append(0)
        for shape in range(len(SHAPES)):
            for colour, paint in enumerate(COLOURS.values()):
                found.append(torch.where(things(shape)[:, None], torch.tensor(paint)[:, None, None], light))
                kinds += [1 + shape * len(COLOURS) + colour] * PLACES
    return torch.cat(found).flatten(1) * 2 - 1, torch.tensor(kinds)


def _far(pictures: Tensor) -> Tensor:
    """How far each half of pictures is from every half that can be, `[b 2 m]`."""
    sides = torch.stack(pictures.split(HALF, -1), 1).flatten(2)
    return torch.cdist(sides, halves()[0].expand(len(sides), -1, -1)).square()


def unclean(pictures: Tensor) -> Tensor:
    """What is left of pictures where the nearest that can be is taken away."""
    nearest = halves()[0][_far(pictures).argmin(-1)]  # [b 2 384]
    return pictures - torch.cat(nearest.unflatten(-1, (3, SIDE, HALF)).unbind(1), -1)


def _read(model: Any, prompts: Sequence[Prompt]) -> Tensor:
    """Prompts as the cross-attention sees them, `[b 5 e]`, without a call of the model's own parts."""
    found: Tensor = model.words.weight[torch.tensor([prompt.tokens for prompt in prompts])] + model.places
    return found


class TwoThings(Scenes):
    """A thing on the left and another on the right, each by its colour and shape."""

    name = "two things"
    about = "Draws two things by colour and shape, each in its half of the picture."

    def require(self, model: Any, tokenizer: Any) -> None:
        if not isinstance(model, Denoiser):
            raise RefusedModel(f"{self.title} is drawn by the denoiser of the claims, not by {type(model).__name__}")

    def scene(self, tokenizer: Any, draw: random.Random) -> Scene:
        both = [(draw.choice(list(COLOURS)), draw.choice(SHAPES)) for _ in range(2)]
        asked = " ".join([*(f"{colour} {shape}" for colour, shape in both), draw.choice(list(GROUNDS))])
        right = [1 + SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour) for colour, shape in both]
        noise = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(draw.getrandbits(62)))
        return Scene(Prompt(tuple(tokenizer.encode(asked)), ROLES), tuple(right), noise)

    def step(self, prompt: Prompt, model: Any, x: Tensor, number: int) -> Tensor:
        return self._step(_read(model, [prompt]), model, x, number)

    def _step(self, context: Tensor, model: Any, x: Tensor, number: int) -> Tensor:
        t = torch.full((len(x),), 1 - number / self.steps)
        found: Tensor = x - model(noised=x, t=t, context=context.expand(len(x), -1, -1)) / self.steps
        return found

    def judge(self, pictures: Tensor) -> Tensor:
        far, kinds = _far(pictures), halves()[1]
        scores = torch.full((*far.shape[:-1], KINDS), -torch.inf)
        return scores.scatter_reduce(-1, kinds.expand_as(far), -far, "amax")

    def real(self, model: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
        """Pictures of two things, over which lies what is unclean in as many that the model drew of other prompts."""
        by = torch.Generator().manual_seed(0)
        scenes = [self.scene(tokenizer, random.Random(f"{self.name} unclean {i}")) for i in range(PICTURES)]
        x = torch.cat([scene.noise for scene in scenes])
        context = _read(model, [scene.prompt for scene in scenes])
        for number in range(self.steps):
            x = self._step(context, model, x, number)
        colour, shape = (torch.randint(4, (PICTURES, 2), generator=by) for _ in range(2))
        place, ground = torch.randint(PLACES, (PICTURES, 2), generator=by), torch.randint(3, (PICTURES,), generator=by)
        pictures, _, _ = painted(colour, shape, place, torch.ones(PICTURES, 2, dtype=torch.bool), ground)
        return pictures + unclean(x), 1 + shape * len(COLOURS) + colour
