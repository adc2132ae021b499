"""V2P: the loss in loops over patches, its gradient, and that a model trained on it looks at the box's middle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Call
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.regions import PerText, Region
from heedful.methods import V2P

N, ROWS, COLS = 19, 3, 5
PICTURE = Region(((2, 12), (13, 18)), (ROWS, COLS))
PLACES = [*range(2, 12), *range(13, 18)]
TARGETS = [((3, 5), (8, 9)), ((10, 12), (16, 17))]  # boxes of 2 x 2, one by a diagonal, and of 2 x 5
ASKING = ((4, 6),)


def drawn(seed: int = 0) -> Tensor:
    scores = 2 * torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.softmax(-1)


def call(targets: Any = TARGETS, text: Tensor | None = None) -> Call:
    regions = PerText(Region(spans) for spans in targets)
    bare = Bare(text=text, rules=None if text is not None else ())
    return replace(bare.call, roles={"patches": PICTURE, "target": regions, "asking": Region(ASKING)})


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def of_query(weights: Tensor, spans: Any, suppression: float, peak: float) -> Tensor:
    """The loss of one query by its weights `[h k]`; its box is around the patches named."""
    named = [divmod(i, COLS) for i, p in enumerate(PLACES) if any(a <= p < b for a, b in spans)]
    top, bottom = min(y for y, _ in named), max(y for y, _ in named) + 1
    left, right = min(x for _, x in named), max(x for _, x in named) + 1
    wanted, looks = {}, {}
    for i, place in enumerate(PLACES):
        y, x = divmod(i, COLS)
        looks[y, x] = sum(weights[h, place] for h in range(4)) / 4
        if top <= y < bottom and left <= x < right:
            across = [phi((e - (left + right) / 2) / ((right - left) / peak)) for e in (x, x + 1)]
            down = [phi((e - (top + bottom) / 2) / ((bottom - top) / peak)) for e in (y, y + 1)]
            wanted[y, x] = (across[1] - across[0]) * (down[1] - down[0])
    loss = torch.zeros((), dtype=torch.float64)
    for at, look in looks.items():
        share = look / sum(looks.values())
        if at in wanted:
            t = wanted[at] / sum(wanted.values())
            loss = loss + t * (math.log(t) - torch.log(share))
        else:
            loss = loss + suppression * share
    return loss


@pytest.mark.parametrize(("suppression", "peak"), [(1.0, 4.1325), (0.3, 2.0)])
def test_the_loss_of_last_tokens_and_its_gradient(suppression: float, peak: float) -> None:
    weights, other = drawn().requires_grad_(), drawn().requires_grad_()
    found = V2P(0.7, suppression, peak).calibrate(weights, call())
    wanted = sum(of_query(other[b, :, N - 1], TARGETS[b], suppression, peak) for b in range(2)) * 0.7 / 2
    assert close(found, wanted)
    found.backward()
    wanted.backward()
    assert weights.grad is not None
    assert other.grad is not None
    assert bool(other.grad.any())
    assert close(weights.grad, other.grad)


def test_queries_that_a_role_names_and_texts_without_a_box() -> None:
    weights = drawn(1)
    method = V2P(asking="asking")
    wanted = sum(of_query(weights[b, :, i], TARGETS[b], 1.0, 4.1325) for b in range(2) for i in (4, 5)) / 4
    assert close(method.calibrate(weights, call()), wanted)
    lonely = call([TARGETS[0], ((0, 1),)])  # its target is no patch
    wanted = sum(of_query(weights[0, :, i], TARGETS[0], 1.0, 4.1325) for i in (4, 5)) / 2
    assert close(method.calibrate(weights, lonely), wanted)
    with pytest.warns(InactiveWarning, match=r"layer 0: none of 'target' is a patch of 'patches' in any text"):
        assert method.calibrate(weights, call([((0, 1),)] * 2)) == 0


def test_padding_moves_the_picture_along_and_does_not_ask() -> None:
    """A text that begins behind padding: positions count from its beginning, so its last patches are not there."""
    text = torch.arange(N)[None] >= torch.tensor([[0], [1]])
    weights = drawn(2)
    found = V2P(asking="asking").calibrate(weights, call(text=text))
    moved = torch.cat([weights[1, :, :, 1:], torch.zeros(4, N, 1)], -1)
    wanted = sum(of_query(weights[0, :, i], TARGETS[0], 1.0, 4.1325) for i in (4, 5))
    wanted = wanted + sum(of_query(moved[:, i + 1], TARGETS[1], 1.0, 4.1325) for i in (4, 5))
    assert close(found, wanted / 4)


def test_padding_behind_a_text_does_not_ask() -> None:
    weights, given = drawn(3), call(text=torch.arange(N)[None] < torch.tensor([[N], [N - 1]]))
    given = replace(given, roles=dict(given.roles) | {"asking": Region(((N - 2, N),))})
    wanted = [of_query(weights[b, :, i], TARGETS[b], 1.0, 4.1325) for b, i in ((0, N - 2), (0, N - 1), (1, N - 2))]
    assert close(V2P(asking="asking").calibrate(weights, given), sum(wanted) / 3)


def test_a_layer_that_looks_at_nothing_has_a_finite_loss() -> None:
    found = V2P().calibrate(torch.zeros(2, 4, N, N), call())
    assert bool(found.isfinite())
    assert found > 10


def test_it_joins_the_loss_and_training_moves_attention_into_the_box() -> None:
    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    with attach(model, V2P(), roles={"target": ((6, 8), (10, 12))}) as run:
        run(**inputs)
        before, optimiser = run.loss().item(), torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(10):
            optimiser.zero_grad()
            run(**inputs)
            run.loss().backward()
            optimiser.step()
        assert run.loss().item() < before
    with pytest.warns(InactiveWarning, match="which was idle"), attach(model, V2P.neutral(), roles={}) as run:
        assert close_model(run(**inputs).logits, model(**inputs).logits)


def test_says_what_is_wrong() -> None:
    assert V2P() == V2P(1.0, 1.0, 4.1325, "target", "", "patches")
    assert V2P.neutral().weight == 0
    assert V2P.example().target == "marked"
    assert V2P(0.0).idle(call())
    assert not V2P(0.1).idle(call())
    V2P(weight=0.0, suppression=0.0, peak=0.1)
    for wrong in (
        {"weight": -0.1}, {"weight": math.inf}, {"suppression": -1.0}, {"suppression": math.inf}, {"peak": 0.0},
        {"peak": math.inf}, {"target": ""}, {"patches": ""},
    ):  # fmt: skip
        with pytest.raises(FieldError, match=rf"V2P\.{next(iter(wrong))} = "):
            V2P(**wrong)  # type: ignore[arg-type]
