"""Attend-and-excite: the loss of the most neglected subject by loops, and a step down its slope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.attend_and_excite import AttendAndExcite

from .painter import GRID, PLACES, WORDS, Painter, inputs, maps, shared, smoothed

ROLES = {"subjects": ((1, 2), (3, 5)), "text": ((1, 6),), "cut": ((0, 4),)}


def _loss(weights: Tensor, subjects: list[int], text: list[int], sharpness: float, smooth: bool) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype)
    for one in weights:
        won = shared(one, text, sharpness)
        each = []
        for word in subjects:
            image = smoothed(won[word]) if smooth else won[word]
            each.append(1 - max(image[place] for place in range(PLACES)))
        total = total + max(each)
    return total


CASES = (
    (AttendAndExcite(), [1, 3, 4], list(range(WORDS))),
    (AttendAndExcite(grid=GRID, sharpness=7.0), [1, 3, 4], list(range(WORDS))),
    (AttendAndExcite(text="text", sharpness=2.0), [1, 3, 4], [1, 2, 3, 4, 5]),
    (AttendAndExcite(text="cut", sharpness=2.0), [1, 3], [0, 1, 2, 3]),
    (AttendAndExcite(role="cut", text="text", sharpness=5.0), [1, 2, 3], [1, 2, 3, 4, 5]),
)


@pytest.mark.parametrize(("method", "subjects", "text"), CASES, ids=repr)
def test_the_loss_and_its_slope(method: AttendAndExcite, subjects: list[int], text: list[int]) -> None:
    model, given = Painter(), inputs(3)
    x = given["x"].clone().requires_grad_()
    mean = sum(maps(model, x, given["context"])) / 2
    want = _loss(mean, subjects, text, method.sharpness, method.grid is not None)
    (slope,) = torch.autograd.grad(want, x)
    with attach(model, method, roles=ROLES, inputs=given) as run:
        run(x=x, context=given["context"])
        assert close(run.loss(), want.detach().float())
        assert close(method.moved(x, run.loss(), 0, 5).float(), (x - 20.0 * slope).detach().float())


def test_each_text_has_subjects_of_its_own() -> None:
    model, given = Painter(), inputs()
    mean = sum(maps(model, **given)) / 2
    want = sum(_loss(mean[i : i + 1], words, list(range(WORDS)), 9.0, False) for i, words in enumerate(([0], [2, 5])))
    roles = [{"subjects": ((0, 1),)}, {"subjects": ((2, 3), (5, 6))}]
    with attach(model, AttendAndExcite(sharpness=9.0), roles=roles, inputs=given) as run:
        run(**given)
        assert close(run.loss(), torch.as_tensor(want).float())


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"role": ""}, "AttendAndExcite.role = '': must name a role"),
        ({"sharpness": 0.0}, "AttendAndExcite.sharpness = 0.0: must be above 0"),
        ({"sharpness": float("inf")}, "AttendAndExcite.sharpness = inf: must be above 0 and finite"),
        ({"rate": -1.0}, "AttendAndExcite.rate = -1.0: must be 0 or more"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            AttendAndExcite(**settings)
