"""New words for two things of new colours, learnt from a few pictures that show both; and what they then draw."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims._pictures import (
    COLOURS,
    GROUNDS,
    HALF,
    ID,
    PATCH,
    SHAPES,
    SIDE,
    Denoiser,
    denoiser,
    sample,
    things,
)
from heedful import attach
from heedful.core.method import Stack
from heedful.methods.intervene.diffusion._map_loss import MapLoss

NEW = ((0.9, 0.2, 0.9), (0.1, 0.9, 0.9))  # colours that no word names
SHOWN, LEARN, RATE, BATCH = 6, 60, 3e-3, 12
TRIED, STEPS = 8, 8  # pictures of each prompt that is tried, and steps of their making

Roles = Mapping[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, eq=False)
class Shown:
    """Pictures of the two things, the one on the left and the other on the right."""

    pictures: Tensor  # [n 3 16 16], from -1 to 1
    grounds: Tensor  # [n], their light from 0 to 1
    places: Tensor  # [n 2 64], which patches are at least half a thing's
    shapes: tuple[int, int]

    @staticmethod
    def drawn(by: torch.Generator) -> Shown:
        shapes = torch.randperm(len(SHAPES), generator=by)[:2].tolist()
        light = torch.tensor(list(GROUNDS.values()))[torch.randint(len(GROUNDS), (SHOWN,), generator=by)]
        picture, covered = light[:, None, None, None].expand(SHOWN, 3, SIDE, SIDE).clone(), []
        for side, shape in enumerate(shapes):
            every = things(shape)
            mine = torch.zeros(SHOWN, SIDE, SIDE, dtype=torch.bool)
            part = slice(side * HALF, (side + 1) * HALF)
            mine[..., part] = every[torch.randint(len(every), (SHOWN,), generator=by)]
            picture = torch.where(mine[:, None], torch.tensor(NEW[side])[:, None, None], picture)
            covered.append(F.avg_pool2d(mine.float()[:, None], PATCH).flatten(1) >= 0.5)
        return Shown(picture * 2 - 1, light, torch.stack(covered, 1), (shapes[0], shapes[1]))


class Words(nn.Module):
    """A copy of the denoiser, two new words, and prompts of them."""

    def __init__(self, shown: Shown) -> None:
        super().__init__()
        self.model: Denoiser = copy.deepcopy(denoiser())
        self.shapes = shown.shapes
        known = self.model.words.weight[[ID[name] for name in COLOURS]].mean(0)
        self.new = nn.Parameter(known.repeat(2, 1))
        self.learnt = [self.new]
        for block in self.model.blocks:
            self.learnt += list(block.cross.kv.requires_grad_().parameters())

    def read(self, left: Tensor, right: Tensor, grounds: Tensor) -> Tensor:
        """Prompts as cross-attention sees them `[n 5 e]`, with new thing 0, 1 or -1 for none on each side, `[n]`."""
        table = self.model.words.weight
        nothing = table[ID["nothing"]][None]
        named = torch.cat([nothing, self.new])
        kinds = torch.cat([nothing, table[[ID[SHAPES[shape]] for shape in self.shapes]]])
        lights = torch.tensor(list(GROUNDS.values()))
        light = table[ID["dark"] + (grounds[:, None] - lights).abs().argmin(-1)]
        parts = [words[side + 1] for side in (left, right) for words in (named, kinds)]
        return torch.stack([*parts, light], 1) + self.model.places


def learnt(shown: Shown, method: MapLoss | Stack | None, roles: list[tuple[Roles, Roles]], seed: int) -> Words:
    """The words after they were learnt from the pictures, under a loss on their maps or none.

    Prompts name both things, but not in the order in which they stand: `roles` has, for each picture, those of a prompt
    that names the left one first, and those of one that names it last.
    """
    by = torch.Generator().manual_seed(seed)
    words = Words(shown)
    optimiser = torch.optim.Adam(words.learnt, RATE)
    first = torch.zeros(SHOWN, dtype=torch.long)
    given = {"noised": shown.pictures, "t": torch.ones(SHOWN), "context": words.read(first, 1 - first, shown.grounds)}

    def losses(run: Any) -> None:
        for _ in range(LEARN):
            picked = torch.randint(SHOWN, (BATCH,), generator=by)
            pictures, t = shown.pictures[picked], torch.sigmoid(torch.randn(BATCH, generator=by))
            noise, part = torch.randn(pictures.shape, generator=by), t[:, None, None, None]
            first = torch.randint(2, (BATCH,), generator=by)
            context = words.read(first, 1 - first, shown.grounds[picked])
            if run is not words.model:
                run.roles = [roles[i][j] for i, j in zip(picked.tolist(), first.tolist(), strict=True)]
            told = run(noised=(1 - part) * pictures + part * noise, t=t, context=context)
            loss = F.mse_loss(told, noise - pictures)
            if run is not words.model:
                loss = loss + run.loss()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    if method is None:
        losses(words.model)
    else:
        with torch.no_grad():
            run = attach(words.model, method, roles=[each[0] for each in roles], inputs=given)
        with run:
            losses(run)
    return words


@torch.no_grad()
def drawn(words: Words, seed: int) -> dict[str, float]:
    """How many things stand in their own colour where they are asked for, and how many stand there unasked."""
    by = torch.Generator().manual_seed(seed)
    grounds = torch.tensor(list(GROUNDS.values()))[torch.randint(len(GROUNDS), (TRIED,), generator=by)]
    found: dict[str, list[float]] = {"own colour": [], "nothing where none": []}
    for left, right in ((0, -1), (-1, 0), (1, -1), (-1, 1), (0, 1), (1, 0)):
        noise = torch.randn(TRIED, 3, SIDE, SIDE, generator=by)
        context = words.read(torch.full((TRIED,), left), torch.full((TRIED,), right), grounds)
        pictures = sample(noise, lambda _, x, t, context=context: words.model(noised=x, t=t, context=context), STEPS)
        for side, asked in enumerate((left, right)):
            seen = _seen(pictures[..., side * HALF : (side + 1) * HALF], grounds)
            if asked < 0:
                found["nothing where none"].append(float((seen < 0).float().mean()))
            else:
                found["own colour"].append(float((seen == len(COLOURS) + asked).float().mean()))
    return {name: sum(each) / len(each) for name, each in found.items()}


def _seen(halves: Tensor, grounds: Tensor) -> Tensor:
    """The colour of what halves show, by the nearest of all that can be: known ones, then new; -1 for none."""
    paints = torch.tensor([*COLOURS.values(), *NEW])
    out = []
    for half, light in zip(halves, grounds.tolist(), strict=True):
        empty = torch.full((1, 3, SIDE, HALF), light)
        every = torch.cat([things(shape) for shape in range(len(SHAPES))])[:, None]
        painted = torch.stack([torch.where(every, paint[:, None, None], light) for paint in paints])
        far = (torch.cat([empty, painted.flatten(0, 1)]) * 2 - 1 - half).square().sum((1, 2, 3))
        best = int(far.argmin())
        out.append(-1 if best == 0 else (best - 1) // len(every))
    return torch.tensor(out)


def spans(places: Tensor) -> tuple[tuple[int, int], ...]:
    """Which of the places `[64]` are marked, as spans."""
    return tuple((i, i + 1) for i in places.nonzero().flatten().tolist())


@torch.no_grad()
def of_maps(words: Words, shown: Shown, method: MapLoss | Stack, roles: list[tuple[Roles, Roles]], seed: int) -> float:
    """A loss on the maps of the shown pictures, half noised."""
    noise = torch.randn(shown.pictures.shape, generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(SHOWN, dtype=torch.long)
    given = {
        "noised": 0.5 * (shown.pictures + noise),
        "t": torch.full((SHOWN,), 0.5),
        "context": words.read(first, 1 - first, shown.grounds),
    }
    with attach(words.model, method, roles=[each[0] for each in roles], inputs=given) as run:
        run(**given)
        return float(run.loss())
