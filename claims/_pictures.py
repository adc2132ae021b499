"""How the small denoiser was trained on pictures of two coloured things, and a judge of them without a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heedful import models
from heedful.models.small_denoiser import FILE, GRID, HEADS, LAYERS, LENGTH, PATCH, WIDTH, Attention, Denoiser
from heedful.models.two_things import (
    COLOURS,
    GROUNDS,
    HALF,
    ID,
    PLACES,
    SHAPES,
    SIDE,
    WORDS,
    draw,
    outline,
    painted,
    things,
)

__all__ = [  # with what comes along with heedful
    "COLOURS", "CONCEPTS", "GRID", "GROUNDS", "HALF", "HEADS", "ID", "LAYERS", "LENGTH", "PATCH", "PLACES", "SEED",
    "SHAPES", "SIDE", "STEPS", "WIDTH", "WORDS", "Attention", "Denoiser", "denoiser", "draw", "judge", "off_ground",
    "outline", "painted", "record", "right", "sample", "score", "things", "train",
]  # fmt: skip

CONCEPTS = {"colour": (0, 2), "shape": (1, 3), "ground": (4,)}  # and which of a picture's words are theirs
STEPS, BATCH, SEED, RATE = 5800, 32, 0, 2e-3  # of the training


def judge(pictures: Tensor) -> Tensor:
    """The words `[n 5]` of the picture that comes nearest, among all that can be."""
    each, named = [], []
    for ground, light in enumerate(GROUNDS.values()):
        halves, words = [torch.full((1, 3, SIDE, HALF), light)], [(ID["nothing"], ID["nothing"])]
        for shape in range(len(SHAPES)):
            where = things(shape)[:, None]
            for colour, paint in enumerate(COLOURS.values()):
                halves.append(torch.where(where, torch.tensor(paint)[:, None, None], light))
                words += [(ID["red"] + colour, ID["square"] + shape)] * len(where)
        found = torch.cat(halves).flatten(1) * 2 - 1
        sides = torch.stack(pictures.split(HALF, -1), 1).flatten(2)  # [n 2 e]
        far = torch.cdist(sides, found.expand(len(sides), -1, -1)).square()
        nearest = far.min(-1)
        each.append(nearest.values.sum(-1))
        said = torch.tensor(words)[nearest.indices].flatten(1)
        named.append(torch.cat([said, torch.full((len(said), 1), ID["dark"] + ground)], 1))
    best = torch.stack(each).argmin(0)
    return torch.stack(named)[best, torch.arange(len(best))]


def off_ground(pictures: Tensor, words: Tensor) -> Tensor:
    """Where pictures are not the ground that their words name, `[n 16 16]`."""
    light = torch.tensor(list(GROUNDS.values()))[words[:, 4] - ID["dark"]] * 2 - 1
    return (pictures - light[:, None, None, None]).abs().mean(1) > 0.25


def right(pictures: Tensor, words: Tensor) -> dict[str, float]:
    """Which share of the words of each concept the pictures show."""
    hits = (judge(pictures) == words).float()
    return {concept: float(hits[:, list(places)].mean()) for concept, places in CONCEPTS.items()}


def train(say: Callable[[str], None] = print) -> Denoiser:
    """From nothing, by flow matching: the loss is that of `noise - picture` told from their mixture."""
    torch.manual_seed(SEED)
    by, model = torch.Generator().manual_seed(SEED), Denoiser()
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.99), weight_decay=0.0)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / STEPS))
        pictures, words, _ = draw(BATCH, by)
        words[torch.rand(BATCH, generator=by) < 0.15] = 0  # so that it draws without words too
        t, noise = torch.sigmoid(torch.randn(BATCH, generator=by)), torch.randn(pictures.shape, generator=by)
        part = t[:, None, None, None]
        loss = F.mse_loss(model((1 - part) * pictures + part * noise, t, model.read(words)), noise - pictures)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for name, p in model.named_parameters():
            mean[name].lerp_(p.detach(), 1 - min(0.998, (1 + step) / (10 + step)))
        if step % 500 == 499:
            say(f"{step + 1}: {loss.item():.4f}")
    model.load_state_dict(mean)
    return model.eval()


@torch.no_grad()
def sample(
    noised: Tensor,
    flow: Callable[[int, Tensor, Tensor], Tensor],
    steps: int,
    start: float = 1.0,
    after: Callable[[float, Tensor], Tensor] = lambda t, x: x,
    before: Callable[[int, Tensor, Tensor], Tensor] = lambda step, x, t: x,
) -> Tensor:
    """Pictures from noised ones, along `flow(step, x, t)`.

    `before(step, x, t)` is what each step begins with, and `after(t, x)` what it leaves.
    """
    times = torch.linspace(start, 0, steps + 1).tolist()
    for step, (t, then) in enumerate(pairwise(times)):
        now = torch.full((len(noised),), t)
        noised = before(step, noised, now)
        noised = after(then, noised + (then - t) * flow(step, noised, now))
    return noised


@cache
def denoiser() -> Denoiser:
    """The one that is shipped."""
    return cast(Denoiser, models.denoiser().model)


def record() -> dict[str, str]:
    """What is written beside the weights: the training's settings, and the share of words that its pictures show."""
    with safe_open(FILE, "pt") as found:
        return dict(found.metadata())


def score(model: Denoiser, count: int = 500, steps: int = 20) -> dict[str, float]:
    """How well it draws what it is told, without guidance, for words and noise that no training saw."""
    by = torch.Generator().manual_seed(SEED + 1)
    _, words, _ = draw(count, by)
    context = model.read(words)
    pictures = sample(
        torch.randn(count, 3, SIDE, SIDE, generator=by), lambda _, x, t: model(noised=x, t=t, context=context), steps
    )
    return right(pictures, words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trained = train()
    found = {name: f"{share:.3f}" for name, share in score(trained).items()}
    print(found)
    save_file(trained.state_dict(), FILE, {"steps": str(STEPS), "batch": str(BATCH), "seed": str(SEED), **found})
