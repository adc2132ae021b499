"""DisenDiff: maps that bind and part by loops, and what the loss gives back to new words, and not to their kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, InactiveWarning, StatisticError
from heedful.methods.intervene.diffusion.disen_diff import DisenDiff

from .painter import GRID, PLACES, Painter, check_loss, inputs, maps, smoothed

ROLES = {"first": ((0, 2),), "second": ((3, 4), (5, 6)), "third": ((1, 3),), "short": ((4, 5),)}
WORDS = {"first": (0, 1), "second": (3, 5), "third": (1, 2)}


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    both = sum(one[i] * other[i] for i in range(PLACES))
    either = sum(one[i] + other[i] for i in range(PLACES)) - both
    return (both + 1) / (either + 1)


def _loss(weights: Tensor, things: tuple[str, ...], smooth: bool) -> Tensor:
    total = torch.zeros((), dtype=weights.dtype)
    for text in weights:

        def level(word: int, text: Tensor = text) -> Tensor:
            image = text[:, word]
            found = (image - image.min()) / (image.max() - image.min())
            return smoothed(found) if smooth else found

        kinds = [level(WORDS[thing][1]) ** 2 for thing in things]
        for thing, kind in zip(things, kinds, strict=True):
            total = total + 1 - _overlap(level(WORDS[thing][0]), kind.detach())
        pairs = [(i, j) for i in range(len(kinds)) for j in range(i)]
        for i, j in pairs:
            total = total + _overlap(kinds[i], kinds[j]) / len(pairs)
    return total / len(weights)


CASES = (
    DisenDiff(weight=1.0),
    DisenDiff(weight=0.3, grid=GRID),
    DisenDiff(things=("second", "first", "third"), weight=2.0),
)


@pytest.mark.parametrize("method", CASES, ids=repr)
def test_the_loss_and_what_it_gives_back(method: DisenDiff) -> None:
    model, given = Painter().requires_grad_(), inputs(3)
    want = method.weight * _loss(sum(maps(model, **given)) / 2, method.things, method.grid is not None)
    check_loss(model, method, want, ROLES, given)


def test_each_text_has_things_of_its_own() -> None:
    model, given = Painter(), inputs()
    mean = sum(maps(model, **given)) / 2
    roles = [{"first": ((0, 2),), "second": ((3, 4), (5, 6))}, {"first": ((1, 3),), "second": ((0, 2),)}]
    want = (_loss(mean[:1], ("first", "second"), False) + _loss(mean[1:], ("third", "first"), False)) / 2
    with attach(model, DisenDiff(weight=1.0), roles=roles, inputs=given) as run:
        run(**given)
        assert close(run.loss(), want.float())


def test_texts_that_name_no_thing_are_left_out() -> None:
    model, given = Painter(), inputs()
    mean = sum(maps(model, **given)) / 2
    mine = {"first": ((0, 2),), "second": ((3, 4), (5, 6))}
    none: dict[str, Any] = {"first": (), "second": ()}
    level = (mean[0] - mean[0].amin(0)) / (mean[0].amax(0) - mean[0].amin(0))
    nothing, kind = torch.zeros(PLACES, dtype=torch.float64), level[:, 1] ** 2
    alone = 1 - _overlap(level[:, 0], kind) + _overlap(kind, nothing)
    for roles, want in (
        ([mine, none], _loss(mean[:1], ("first", "second"), False)),
        ([none | {"first": ((0, 2),)}, none], alone),
    ):
        with attach(model, DisenDiff(weight=1.0), roles=roles, inputs=given) as run:
            run(**given)
            assert close(run.loss(), want.float())


def test_a_word_that_is_not_there_has_no_map() -> None:
    """ "short" has a new word and no word for its kind, whose map is nothing everywhere."""
    model, given = Painter(), inputs()
    mean = sum(maps(model, **given)) / 2
    want = torch.zeros((), dtype=torch.float64)
    for text in mean:
        level = (text - text.amin(0)) / (text.amax(0) - text.amin(0))
        nothing, kind = torch.zeros(PLACES, dtype=torch.float64), level[:, 1] ** 2
        want += 2 - _overlap(level[:, 0], kind) - _overlap(level[:, 4], nothing) + _overlap(kind, nothing)
    with attach(model, DisenDiff(things=("first", "short"), weight=1.0), roles=ROLES, inputs=given) as run:
        run(**given)
        assert close(run.loss(), (want / 2).float())


def test_where_nothing_attends_to_words_the_loss_says_so() -> None:
    model = models.tiny("llama")
    told = pytest.warns(InactiveWarning, match=r"changed nothing with DisenDiff\(.*\) at PATTERN, which was idle")
    with told, attach(model, DisenDiff()) as run:
        with pytest.raises(StatisticError, match="has penalised nothing yet: run the model first"):
            run.loss()
        run(input_ids=torch.arange(3, 9)[None])
        with pytest.raises(StatisticError, match="penalised nothing in the last forward: it rests there, or no layer"):
            run.loss()


def test_where_no_text_names_a_thing_the_run_says_so() -> None:
    model, given, nowhere = Painter(), inputs(), {"first": (), "second": ()}
    told = pytest.warns(InactiveWarning, match=r"changed nothing with DisenDiff\(.*\) at PATTERN: its penalty is 0")
    with told, attach(model, DisenDiff(), roles=nowhere, inputs=given) as run:
        run(**given)
        assert float(run.loss()) == 0
        assert not run.active
    with attach(model, DisenDiff(), roles=nowhere, inputs=given) as run:
        run(**given)
        run.roles = ROLES
        run(**given)
        assert run.active


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"things": ("first",)}, r"DisenDiff.things = \('first',\): must name two or more roles"),
        ({"things": ("a", "b", "a")}, "DisenDiff.things = .*: must name two or more roles"),
        ({"weight": -1.0}, "DisenDiff.weight = -1.0: must be 0 or more"),
        ({"weight": float("inf")}, "DisenDiff.weight = inf: must be 0 or more"),
        ({"grid": (1, 4)}, r"DisenDiff.grid = \(1, 4\): must be rows and columns, each 2 or more"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            DisenDiff(**settings)
    assert DisenDiff(weight=0.0).weight == 0
