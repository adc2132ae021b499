"""PromptToPrompt: maps of another run in place of a run's own, against a model that is written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods.intervene.diffusion.prompt_to_prompt import PromptToPrompt

from .painter import HEADS, PLACES, WIDTH, WORDS, Both, inputs

Maps = dict[int, Tensor]


def _by_hand(model: Both, x: Tensor, context: Tensor, given: Maps, only: tuple[int, ...] = ()) -> tuple[Tensor, Maps]:
    """What comes out, with some layers' maps given, of cross-attention for some words only; and all maps."""
    seen: Maps = {}
    for number, layer in enumerate((model.own, model.words, model.last)):
        source = context if number == 1 else x
        q, k, v = layer.heads(layer.q(x)), layer.heads(layer.k(source)), layer.heads(layer.v(source))
        weights = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1)
        if number in given:
            columns = range(weights.shape[3]) if number != 1 or not only else only
            for j in columns:
                weights[..., j] = given[number][..., j]
        seen[number] = weights
        x = x + (weights @ v).transpose(1, 2).flatten(2)
    return x, seen


def _steps(model: Both, count: int = 4) -> tuple[list[dict[str, Any]], list[Maps]]:
    batches = [{**inputs(seed=10 + i), "step": (i, count)} for i in range(count)]
    return batches, [_by_hand(model, b["x"], b["context"], {})[1] for b in batches]


@pytest.mark.parametrize(("cross", "inner"), [(0.75, 0.25), (0.25, 1.0), (0.0, 0.5), (0.8, 0.4)])
def test_maps_of_the_first_are_taken_in_their_share_of_the_steps(cross: float, inner: float) -> None:
    model, given = Both(), inputs()
    batches, seen = _steps(model)
    method = fit(PromptToPrompt(cross, inner), model, batches)
    assert "step" in batches[0], "what was given is as it was"
    wanted = {f"{layer}.{i}" for i in range(4) for layer in range(3) if i / 4 < (cross if layer == 1 else inner)}
    assert set(method.maps) == wanted
    with attach(model, method, inputs=given) as run:
        for i in range(4):
            with run.denoising(i, of=4):
                found = run(**given)
            mine = {layer: seen[i][layer] for layer in range(3) if f"{layer}.{i}" in wanted}
            assert close(found.float(), _by_hand(model, **given, given=mine)[0].float())
        run.state.changed.update(run.stack.steps())


def test_words_that_are_added_have_maps_of_their_own() -> None:
    model, given = Both(), inputs()
    first = {"x": inputs(seed=9)["x"], "context": given["context"][:, :4]}
    method = replace(fit(PromptToPrompt(), model, [first]), role="old")
    _, seen = _by_hand(model, **first, given={})
    want, _ = _by_hand(model, **given, given=seen, only=(0, 1, 3))
    with attach(model, method, roles={"old": ((0, 2), (3, 4))}, inputs=given) as run:
        assert close(run(**given).float(), want.float())
    with (
        pytest.raises(FieldError, match=r"are \[2, 2, 12, 4\] in layer 1, whose map is \[2, 2, 12, 6\]"),
        attach(model, replace(method, role=""), inputs=given) as run,
    ):
        run(**given)


def test_one_picture_serves_many() -> None:
    model, given = Both(), inputs()
    first = {name: x[:1] for name, x in inputs(seed=9).items()}
    method = fit(PromptToPrompt(inner=0.0), model, [first])
    _, seen = _by_hand(model, **first, given={})
    want, _ = _by_hand(model, **given, given={1: seen[1].expand(2, -1, -1, -1)})
    with attach(model, method, inputs=given) as run:
        assert close(run(**given).float(), want.float())
    three = inputs(3)
    several = fit(PromptToPrompt(inner=0.0), model, [given])
    with pytest.raises(FieldError, match="as many pictures"), attach(model, several, inputs=three) as run:
        run(**three)


def test_without_a_fit_places_look_at_all_alike() -> None:
    model, given = Both(), inputs()
    even = {i: torch.full((2, HEADS, PLACES, n), 1 / n).double() for i, n in enumerate((PLACES, WORDS, PLACES))}
    want, _ = _by_hand(model, **given, given=even)
    with attach(model, PromptToPrompt(), inputs=given) as run:
        assert close(run(**given).float(), want.float())
    bare = Bare(Shape(q=5, k=5), dtype=torch.float64)
    heads, _ = bare.run(PromptToPrompt(), "reference")
    for i in range(5):
        assert close(heads[:, :, i], bare.v[:, :, : i + 1].mean(2).repeat_interleave(2, 1)), "of what it may see"


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"cross": 1.1}, "PromptToPrompt.cross = 1.1: must lie from 0 to 1"),
        ({"inner": -0.1}, "PromptToPrompt.inner = -0.1: must lie from 0 to 1"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            PromptToPrompt(**settings)
    model, given = Both(), inputs()
    for batches in ([], [{**given, "step": (9, 10)}]):
        with pytest.raises(FieldError, match="must hold each forward of the first picture"):
            fit(PromptToPrompt(), model, batches)
    maps = dict(fit(PromptToPrompt(), model, [given]).maps)
    missing = PromptToPrompt(maps=Fitted({name: x for name, x in maps.items() if name != "2.0"}))
    with (
        pytest.raises(FieldError, match="have none for layer 2 and step 0"),
        attach(model, missing, inputs=given) as run,
    ):
        run(**given)
    with (
        pytest.raises(FieldError, match="have none for layer 0 and step 1"),
        attach(model, PromptToPrompt(maps=Fitted(maps)), inputs=given) as run,
        run.denoising(1, of=9),
    ):
        run(**given)
