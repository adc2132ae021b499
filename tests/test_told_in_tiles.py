"""What tiles tell of their rows, and who is left alone there, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.authoring import Call, Method, Site, adds, adds_by_distance, at
from heedful.conformance.tolerances import close
from heedful.core.method import Stack
from heedful.engine.backends import tiled

from .kernel_calls import CAUSAL, RULES, Everything, a_call, draw, run
from .samples import PAPER


class RowAbove(Method):
    """Scores with half of those of the query before."""

    paper = PAPER

    def above(self) -> int:
        return 1

    @at(Site.SCORES)
    def lean(self, scores: Tensor, call: Call) -> Tensor:
        return scores + 0.5 * torch.nn.functional.pad(scores, (0, 0, 1, 0))[..., :-1, :]


class Squared(Method):
    """Squares of what is above zero, as shares of their sum."""

    paper = PAPER

    @at(Site.NORMALISE)
    def square(self, scores: Tensor, call: Call) -> Tensor:
        squares = scores.relu().square()
        return squares / squares.sum(-1, keepdim=True).clamp(min=1e-30)


class Nearer(Method):
    paper = PAPER

    @adds_by_distance
    def lean(self, apart: Tensor, call: Call) -> Tensor:
        return -0.1 * apart.abs()[None]


class Even(Method):
    """Adds to what stands at even places."""

    paper = PAPER

    @adds
    def lean(self, call: Call) -> Tensor:
        return 0.7 * (call.k_pos % 2 == 0)[:, :, None].float()


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5


def _weights(scores: Tensor) -> Tensor:
    n, m = scores.shape[-2:]
    return scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(1 + m - n), -torch.inf).softmax(-1)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows each."""
    monkeypatch.setattr(tiled, "LEAST", 3)
    monkeypatch.setattr(tiled, "MOST", 3)


@pytest.mark.parametrize(
    ("shape", "above"),
    [((2, 4, 2, 40, 40, 8, 8), False), ((1, 2, 1, 7, 23, 8, 8), False), ((2, 4, 2, 40, 40, 8, 8), True)],
)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_entropy_and_peak_are_those_of_each_row(
    backend: str, shape: tuple[int, ...], above: bool, few_rows: None
) -> None:
    q, k, v = draw(shape)
    seen = Everything([])
    run(backend, RowAbove() | seen if above else seen, q, k, v, a_call(shape, CAUSAL))
    scores = _scores(q, k)
    weights = _weights(scores + 0.5 * torch.nn.functional.pad(scores, (0, 0, 1, 0))[..., :-1, :] if above else scores)
    (told,) = seen.seen
    assert close(told.entropy, torch.special.entr(weights).sum(-1).float())  # type: ignore[arg-type]
    assert close(told.peak, weights.amax(-1).float())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("rules", [CAUSAL, RULES["blind rows"]], ids=["causal", "blind rows"])
def test_heads_that_a_step_does_not_touch_have_their_softmax(backend: str, rules: tuple) -> None:  # type: ignore[type-arg]
    shape = (2, 4, 2, 20, 20, 8, 8)
    found, all_heads, none = (
        run(backend, what, *draw(shape), a_call(shape, rules))
        for what in (Squared().on(heads=[1, 2]), Squared(), Stack())
    )
    assert close(found[:, [1, 2]], all_heads[:, [1, 2]])
    assert close(found[:, [0, 3]], none[:, [0, 3]])
    assert not close(all_heads, none)


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_what_goes_by_distance_and_what_does_not_add_up(backend: str) -> None:
    shape = (2, 4, 2, 20, 20, 8, 8)
    q, k, v = draw(shape)
    place = torch.arange(20)
    scores = _scores(q, k) - 0.1 * (place[:, None] - place).abs() + 0.7 * (place % 2 == 0)
    for stack in (Nearer() | Even(), Even() | Nearer()):
        found = run(backend, stack, q, k, v, a_call(shape, CAUSAL))
        assert close(found, (_weights(scores) @ v.double().repeat_interleave(2, 1)).float())


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_a_key_s_mean_is_over_the_queries_that_may_see_it(backend: str) -> None:
    shape, seen = (2, 4, 2, 20, 20, 8, 8), Everything([])
    q, k, v = draw(shape)
    run(backend, seen, q, k, v, a_call(shape, CAUSAL))
    assert close(seen.seen[0].mean, (_weights(_scores(q, k)).sum(-2) / torch.arange(20, 0, -1)).float())


class Fewer(Everything):
    """Carries columns of its own."""

    def carries(self, call: Call) -> Tensor:
        return torch.sin(call.keys.index[:, 0, :, None] * torch.arange(5))


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
def test_each_reader_gets_the_columns_that_it_carries(backend: str) -> None:
    shape = (2, 4, 2, 20, 20, 8, 8)
    wide, narrow = Everything([]), Fewer([])
    for stack in (wide | narrow, narrow | wide):
        run(backend, stack, *draw(shape), a_call(shape, CAUSAL))
    weights = _weights(_scores(*draw(shape)[:2])).mean(1)
    for reader in (wide, narrow):
        columns = reader.carries(a_call(shape, CAUSAL))
        for told in reader.seen:
            assert close(told.carried, (weights @ columns.double()).float())  # type: ignore[arg-type]
