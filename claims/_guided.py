"""Pictures in the making that are moved, each step, down the slope of a loss on words' maps; or as far anywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claims._pictures import GRID, SIDE, denoiser, draw, sample
from heedful import attach
from heedful.core.method import Part, Stack
from heedful.methods.intervene.diffusion._map_loss import Guidance

STEPS = 10
PLACES = 0.2  # what is left of what tells whose word it is, where words are loosened
LAID = (GRID, GRID)  # the picture's places


def prompts(count: int, by: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words `[n 5]` of pictures that have two things, and noise to make them of."""
    _, words, covered = draw(8 * count, by)
    both = covered.flatten(2).any(-1).all(-1).nonzero().flatten()[:count]
    return words[both], torch.randn(count, 3, SIDE, SIDE, generator=by)


def of_two_colours(count: int, by: torch.Generator) -> tuple[Tensor, Tensor]:
    """Those of so many prompts and noises whose things are unlike in colour: of one, none can have the other's."""
    words, noise = prompts(count, by)
    mixed = words[:, 0] != words[:, 2]
    return words[mixed], noise[mixed]


def loosened(words: Tensor) -> Tensor:
    """Words as the model reads them, with little left of what tells whose they are."""
    model = denoiser()
    return model.words(words) + PLACES * model.places


@torch.no_grad()
def plain(noise: Tensor, context: Tensor) -> Tensor:
    return sample(noise, lambda _, x, t: denoiser()(noised=x, t=t, context=context), STEPS)


@torch.no_grad()
def recorded(words: Tensor, noise: Tensor, **more: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Pictures, and every forward of their making, with `more` beside."""
    model, context = denoiser(), denoiser().read(words)
    forwards: list[dict[str, Any]] = []

    def flow(step: int, x: Tensor, t: Tensor) -> Tensor:
        forwards.append({"noised": x, "t": t, "context": context, "step": (step, STEPS), **more})
        found: Tensor = model(noised=x, t=t, context=context)
        return found

    return sample(noise, flow, STEPS), forwards


@torch.no_grad()
def under(what: Part | Stack, noise: Tensor, context: Tensor, **how: Any) -> Tensor:
    """Pictures made under a stack, which is told of each step; `how` goes to `attach`."""
    given = {"noised": noise, "t": torch.ones(len(noise)), "context": context}
    with attach(denoiser(), what, inputs=given, **how) as run:

        def flow(step: int, x: Tensor, t: Tensor) -> Tensor:
            with run.denoising(step, of=STEPS):
                found: Tensor = run(noised=x, t=t, context=context)
                return found

        return sample(noise, flow, STEPS)


def guided(
    method: Guidance, noise: Tensor, context: Tensor, roles: Any, anywhere: torch.Generator | None = None
) -> Tensor:
    """Pictures, moved by the method; with a generator just as far, but in a direction that it draws."""
    model = denoiser()
    given = {"noised": noise, "t": torch.ones(len(noise)), "context": context}
    with attach(model, method, roles=roles, inputs=given) as run:

        def before(step: int, x: Tensor, t: Tensor) -> Tensor:
            with run.denoising(step, of=STEPS), torch.enable_grad():
                run(noised=x.requires_grad_(), t=t, context=context)
                moved = method.moved(x, run.loss(), step, of=STEPS)
            if anywhere is None:
                return moved
            drawn = torch.randn(moved.shape, generator=anywhere)
            far = (moved - x.detach()).flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
            return x.detach() + far[:, None, None, None] * drawn

        def flow(step: int, x: Tensor, t: Tensor) -> Tensor:
            with run.paused():
                return model(noised=x, t=t, context=context)

        return sample(noise, flow, STEPS, before=before)
