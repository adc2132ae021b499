"""What losses on words' maps share, against maps by their formula and steps down slopes that are taken by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.paper import Paper
from heedful.methods.intervene.diffusion._map_loss import Guidance, levelled
from heedful.methods.intervene.diffusion._map_loss import smoothed as smooth

from .painter import GRID, PLACES, WORDS, Painter, inputs, maps, shared, smoothed


class Squares(Guidance):
    """The sum of the squares of what words win, so that the mean of two layers' losses is not that of their mean."""

    paper = Paper("T000", "A test", "Ada Tester", 2026)
    sharpness: float = 0.0  # 0: as they are

    def loss(self, weights: Tensor, call: Call) -> Tensor:
        if self.sharpness:
            return self.shared(weights, call.marked("words")[:, 0], self.sharpness)[:, :, 1:3].square().sum()
        return smooth(self, weights, self.grid).square().sum()


ROLES = {"words": ((1, 4), (5, 6))}


@pytest.mark.parametrize("layers", [None, [0], [1]])
@pytest.mark.parametrize("grid", [None, GRID])
def test_a_loss_is_of_the_mean_over_heads_and_layers(layers: list[int] | None, grid: tuple[int, int] | None) -> None:
    model, given = Painter(), inputs()
    method = Squares(grid=grid)
    each = maps(model, **given)
    mean = sum(each[i] for i in layers or (0, 1)) / len(layers or (0, 1))
    if grid:
        mean = torch.stack([torch.stack([smoothed(text[:, k]) for k in range(WORDS)], -1) for text in mean])
    with attach(model, method if layers is None else method.on(layers=layers), inputs=given) as run:
        run(**given)
        assert close(run.loss(), mean.square().sum().float())
        run(**inputs(seed=1))
        assert not close(run.loss(), mean.square().sum().float()), "each forward has a loss of its own"


@pytest.mark.parametrize("sharpness", [3.0, 50.0])
def test_words_share_the_places(sharpness: float) -> None:
    model, given = Painter(), inputs()
    want = 0.0
    for text in sum(maps(model, **given)) / 2:
        won = shared(text, [1, 2, 3, 5], sharpness)
        want += sum(float(smoothed(won[word]).square().sum()) for word in (1, 2))
    with attach(model, Squares(sharpness=sharpness, grid=GRID), roles=ROLES, inputs=given) as run:
        run(**given)
        assert close(run.loss(), torch.tensor(want))


@pytest.mark.parametrize(("number", "of", "factor"), [(0, 6, 1.0), (2, 6, 0.8), (5, 6, 0.5), (0, 1, 1.0)])
def test_what_is_denoised_moves_down_the_slope(number: int, of: int, factor: float) -> None:
    model, given = Painter(), inputs()
    x = given["x"].clone().requires_grad_()
    loss = (sum(maps(model, x, given["context"])) / 2).square().sum()
    (slope,) = torch.autograd.grad(loss, x)
    method = Squares(rate=3.0, until=1.0)
    with attach(model, method, inputs=given) as run:
        run(x=x, context=given["context"])
        found = method.moved(x, run.loss(), number, of)
    assert not found.requires_grad
    assert close(found.float(), (x - 3.0 * factor**0.5 * slope).detach().float())
    assert not close(found.float(), x.detach().float())


def test_pictures_move_as_they_would_alone() -> None:
    model, given = Painter(), inputs()
    method = Squares(rate=2.0)

    def moved(**inputs: Tensor) -> Tensor:
        with attach(model, method, inputs=inputs) as run:
            x = inputs["x"].clone().requires_grad_()
            run(x=x, context=inputs["context"])
            return method.moved(x, run.loss(), 0, 4)

    alone = [moved(**{name: part[i : i + 1] for name, part in given.items()}) for i in range(2)]
    assert close(moved(**given).float(), torch.cat(alone).float())


def test_later_steps_leave_what_is_denoised() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    for until, number, moves in ((0.5, 3, True), (0.5, 4, False), (0.5, 5, False), (0.0, 0, False), (1.0, 7, True)):
        found = Squares(until=until).moved(x, (2 * x).sum(), number, 8)
        assert bool((found != x).any()) is moves
        assert not found.requires_grad


def test_padded_places_give_nothing_to_words() -> None:
    """The last two of six tokens are padding; places of a picture never are."""
    model = models.tiny("bart", attn_implementation="eager")
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    given = {"input_ids": ids, "decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.no_grad(), attach(model, Squares()) as run:
        found = run(**given, output_attentions=True)
        weights = sum(x.mean(1) for x in found.cross_attentions) / len(found.cross_attentions)
        assert close_model(run.loss(), (weights * mask[..., None]).square().sum())


def test_layers_of_unlike_places_do_not_mix() -> None:
    model, given = Painter(halves=1), inputs()
    with (
        attach(model, Squares(), inputs=given) as run,
        pytest.raises(FieldError, match=r"maps of layer 1 are \[6, 6\]"),
    ):
        run(**given)
    with attach(model, Squares().on(layers=1), inputs=given) as run:
        run(**given)
        assert float(run.loss()) > 0


def test_self_attention_has_no_loss() -> None:
    model = models.tiny("llama")
    run = attach(model, Squares())
    run(**models.tiny_inputs(model))
    assert not run.state.losses
    assert "which was idle" in run.inactive[0]
    run.close()


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rate": -1.0}, "rate = -1.0: must be 0 or more"),
        ({"rate": float("inf")}, "rate = inf: must be 0 or more"),
        ({"until": 1.5}, "until = 1.5: must lie from 0 to 1"),
        ({"until": -0.1}, "until = -0.1: must lie from 0 to 1"),
        ({"grid": (4,)}, r"grid = \(4,\): must be tuple\[int, int\] or None"),
        ({"grid": (4, 1)}, r"grid = \(4, 1\): must be rows and columns, each 2 or more"),
        ({"grid": (1, 4)}, r"grid = \(1, 4\): must be rows and columns, each 2 or more"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            Squares(**settings)
    assert Squares(rate=0.0, until=0.0, grid=(2, 2)).grid == (2, 2)
    given = inputs()
    with (
        pytest.warns(InactiveWarning, match="which was never reached"),
        attach(Painter(), Squares(grid=(2, 4)), inputs=given) as run,
        pytest.raises(FieldError, match=f"must hold the {PLACES} places of the picture, and holds 8"),
    ):
        run(**given)


def test_maps_are_levelled_each_for_itself() -> None:
    given = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [2.0, 4.0]], [[0.5, 7.0], [0.5, 6.0], [0.5, 5.0]]])
    assert levelled(given).mT.tolist() == [[[0.0, 1.0, 0.5], [0.0, 0.25, 1.0]], [[0.0] * 3, [1.0, 0.5, 0.0]]]
    assert close(levelled(given, (1, 2))[1], (given[1] - 0.5) / 6.5)
    tiny = torch.tensor([[[0.0], [1e-8]]], requires_grad=True)
    assert close(levelled(tiny)[0, 1, 0], torch.tensor(0.5))
    levelled(torch.full((1, 2, 1), 0.3, requires_grad=True)).sum().backward()
