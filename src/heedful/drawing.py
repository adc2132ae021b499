"""A diffusion model draws a scene, step by step, under whatever is attached to it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from heedful.core.errors import FieldError
from heedful.core.method import Part, Stack, method_of
from heedful.engine.run import Run
from heedful.shown import Drawing


@runtime_checkable
class Guide(Protocol):
    """A method that moves what is denoised before a step is taken, down the slope of a loss."""

    def moved(self, x: Tensor, loss: Tensor, number: int, of: int) -> Tensor: ...


def guide_of(what: Part | Stack) -> Guide | None:
    """The method among them that moves what is denoised, if one does."""
    methods = [method_of(part) for part in (what if isinstance(what, Stack) else [what])]
    found = [method for method in methods if isinstance(method, Guide)]
    if len(found) > 1:
        rule = "both move what is denoised, down the slope of one loss: leave one of them"
        raise FieldError("compare()", "methods", what, rule, found[0])
    return found[0] if found else None


@torch.no_grad()
def drawn(model: Any, run: Run | None, guide: Guide | None, draws: Drawing, x: Tensor) -> Tensor:
    """The pictures that come of noise `x`, each row one; the run is told of every step."""
    for number in range(draws.steps):
        with nullcontext() if run is None else run.denoising(number, of=draws.steps):
            if run is not None and guide is not None:
                x = _moved(model, run, guide, draws, x, number)
            x = draws.step(model, x, number)
    return x


def _moved(model: Any, run: Run, guide: Guide, draws: Drawing, x: Tensor, number: int) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        draws.step(model, x, number)
        return guide.moved(x, run.loss(), number, draws.steps) if run.state.losses else x.detach()
