"""CONFORM: InfoNCE of words' maps, of this step and the one before, by loops, and a step down its slope."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.conform import CONFORM

from .painter import GRID, PLACES, Painter, inputs, maps, smoothed

ROLES = {"first": ((0, 2),), "second": ((3, 6),), "third": ((2, 3),), "alone": ((2, 3),), "only": ((4, 5),)}
FIRST, SECOND, THIRD = [0, 1], [3, 4, 5], [2]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    dot = sum(a[i] * b[i] for i in range(PLACES))
    return dot / torch.sqrt(sum(a[i] ** 2 for i in range(PLACES)) * sum(b[i] ** 2 for i in range(PLACES)))


def _loss(steps: list[Tensor], groups: list[list[int]], temperature: float, smooth: bool = False) -> Tensor:
    """Over the texts of maps `[b n k]`, this step's first; the mean over ordered pairs of one group."""
    total = torch.zeros((), dtype=torch.float64)
    for text in range(len(steps[0])):
        found = [
            (group, smoothed(step[text, :, word]) if smooth else step[text, :, word])
            for step in steps
            for group, words in enumerate(groups)
            for word in words
        ]
        each = []
        for i, (group, mine) in enumerate(found):
            apart = sum(torch.exp(_cosine(mine, x) / temperature) for other, x in found if other != group)
            for j, (other, x) in enumerate(found):
                if i != j and group == other:
                    like = torch.exp(_cosine(mine, x) / temperature)
                    each.append(-torch.log(like / (like + apart)))
        if each:
            total = total + sum(each) / len(each)
    return total


CASES = (
    (CONFORM(), [FIRST, SECOND]),
    (CONFORM(grid=GRID, temperature=0.07), [FIRST, SECOND]),
    (CONFORM(groups=("first", "third", "second"), temperature=2.0), [FIRST, THIRD, SECOND]),
    (CONFORM(groups=("first", "only")), [FIRST, [4]]),
)


@pytest.mark.parametrize(("method", "groups"), CASES, ids=repr)
def test_the_loss_and_its_slope(method: CONFORM, groups: list[list[int]]) -> None:
    model, given = Painter(), inputs(3)
    x = given["x"].clone().requires_grad_()
    mean = sum(maps(model, x, given["context"])) / 2
    want = _loss([mean], groups, method.temperature, method.grid is not None)
    (slope,) = torch.autograd.grad(want, x)
    with attach(model, method, roles=ROLES, inputs=given) as run:
        run(x=x, context=given["context"])
        assert close(run.loss(), want.detach().float())
        assert close(method.moved(x, run.loss(), 0, 5).float(), (x - 20.0 * slope).detach().float())


def test_maps_of_the_step_before_stand_beside_those_of_this_one() -> None:
    model, method = Painter(), CONFORM()
    given = [inputs(seed=seed) for seed in range(5)]
    means = [sum(maps(model, **one)) / 2 for one in given]
    groups = [FIRST, SECOND]
    with attach(model, method, roles=ROLES, inputs=given[0]) as run:

        def loss(number: int, seed: int) -> Tensor:
            with run.denoising(number, of=9):
                run(**given[seed])
            return run.loss()

        def want(*seeds: int) -> Tensor:
            return _loss([means[seed] for seed in seeds], groups, 0.5).float()

        assert close(loss(0, 0), want(0))
        assert close(loss(0, 1), want(1)), "another move within the first step"
        assert close(loss(1, 2), want(2, 1)), "what the step before came to"
        assert close(loss(1, 3), want(3, 1)), "and within a step it stays"
        assert close(loss(4, 4), want(4, 3))
        assert close(loss(0, 2), want(2)), "another picture begins"
        assert close(loss(1, 0), want(0, 2))
        run(**given[1])
        assert close(run.loss(), want(1)), "a step that was not told stands alone"


def test_nothing_flows_back_into_the_step_before() -> None:
    model, method, given = Painter(), CONFORM(), inputs()
    x, y = (given["x"].clone().requires_grad_() for _ in range(2))
    with torch.no_grad():
        before = sum(maps(model, x + 1, given["context"])) / 2
    (slope,) = torch.autograd.grad(_loss([sum(maps(model, y, given["context"])) / 2, before], [FIRST, SECOND], 0.5), y)
    with attach(model, method, roles=ROLES, inputs=given) as run:
        with run.denoising(0, of=4):
            run(x=x + 1, context=given["context"])
        with run.denoising(1, of=4):
            run(x=y, context=given["context"])
        assert close(method.moved(y, run.loss(), 0, 4).float(), (y - 20.0 * slope).detach().float())
        assert x.grad is None


def test_another_batch_begins_anew() -> None:
    model, given, fewer = Painter(), inputs(3), inputs(2)
    with attach(model, CONFORM(), roles=ROLES, inputs=given) as run:
        with run.denoising(0, of=4):
            run(**given)
        with run.denoising(1, of=4):
            run(**fewer)
        assert close(run.loss(), _loss([sum(maps(model, **fewer)) / 2], [FIRST, SECOND], 0.5).float())


def test_single_words_are_parted_over_two_steps() -> None:
    model, method, given = Painter(), CONFORM(groups=("alone", "only")), inputs()
    mean = sum(maps(model, **given)) / 2
    with attach(model, method, roles=ROLES, inputs=given) as run:
        with run.denoising(0, of=4):
            run(**given)
        assert float(run.loss()) == 0
        with run.denoising(1, of=4):
            run(**given)
        assert close(run.loss(), _loss([mean, mean], [[2], [4]], 0.5).float())


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"groups": ("first",)}, r"CONFORM.groups = \('first',\): must name two or more roles"),
        ({"groups": ("a", "b", "a")}, "CONFORM.groups = .*: must name two or more roles"),
        ({"temperature": 0.0}, "CONFORM.temperature = 0.0: must be above 0"),
        ({"temperature": math.inf}, "CONFORM.temperature = inf: must be above 0 and finite"),
        ({"until": 2.0}, "CONFORM.until = 2.0: must lie from 0 to 1"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            CONFORM(**settings)
