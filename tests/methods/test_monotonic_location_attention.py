"""Monotonic location attention, against its Gaussians token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Call, FieldError, Layer, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.mask import Padding
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import MonotonicLocationAttention
from tests.methods.walking import goes_on_in_a_model

TEXT = torch.ones(2, 13, dtype=torch.bool)
TEXT[1, 8:] = False


def _drawn(text: Tensor = TEXT, q: int = 6) -> tuple[Bare, dict[str, Tensor]]:
    bare = Bare(Shape(q=q, k=text.shape[1]), dtype=torch.float64, rules=(Padding(text),))
    bare.call = replace(bare.call, cross=True, queries=Positions.row(0, q))
    draw = torch.Generator().manual_seed(1)
    params = {name: torch.randn(4, 8, generator=draw, dtype=torch.float64) / 4 for name in ("step", "width")}
    return bare, params


def _looks(q: Tensor, v: Tensor, step: Tensor, width: Tensor, steps: str) -> Tensor:
    """What the tokens of one head get of a source of nothing but `v`: in shares of its length, as the authors count."""
    length, past, out = len(v), 0.0, []
    one = 1 / max(1, length - 1)
    places = torch.arange(length, dtype=torch.float64) * one
    for token in q:
        sigma = (max(0.0, float(width @ token)) + 0.27) / length
        rho = float(step @ token)
        mu = past + one * (max(0.0, rho) if steps == "any" else 1 / (1 + math.exp(-5 * rho)))
        bell = torch.exp(-((places - mu) ** 2) / (2 * sigma**2))
        weights = bell / bell.sum()
        past = float((weights * places).sum())
        out.append(weights @ v)
    return torch.stack(out)


@pytest.mark.parametrize("steps", ["any", "one"])
@pytest.mark.parametrize("sources", [(13, 8), (13, 1), (2, 13)])
def test_heads_go_through_the_source(steps: str, sources: tuple[int, int]) -> None:
    text = torch.arange(13) < torch.tensor(sources)[:, None]
    bare, p = _drawn(text)
    found, _ = bare.run(MonotonicLocationAttention(steps), "reference", params=p)
    for b, length in enumerate(sources):
        for h in range(4):
            want = _looks(bare.q[b, h], bare.v[b, h // 2, :length], p["step"][h], p["width"][h], steps)
            assert close(found[b, h], want)


def test_a_head_that_has_gone_past_the_end_stays_there() -> None:
    bare, p = _drawn()
    bare.q = bare.q.abs()
    found, _ = bare.run(
        MonotonicLocationAttention(), "reference", params={"step": p["step"] * 0 + 9, "width": p["width"] * 0}
    )
    for b, length in enumerate((13, 8)):
        assert close(found[b, :, -1], bare.v[b, :, length - 1].repeat_interleave(2, 0))


def test_the_first_steps_loss_and_gradient() -> None:
    """The gradient goes through the places looked at before."""
    bare, p = _drawn()
    leaves = [*p.values(), bare.q, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    loss = bare.run(MonotonicLocationAttention("one"), "reference", params=p)[0].pow(2).sum()
    slopes = torch.autograd.grad(loss, leaves)
    want = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate((13, 8)):
        for h in range(4):
            place = torch.zeros((), dtype=torch.float64)
            places = torch.arange(length, dtype=torch.float64)
            for token in bare.q[b, h]:
                sigma = (torch.relu(p["width"][h] @ token) + 0.27) * (length - 1) / length
                far = (places - place - torch.sigmoid(5 * (p["step"][h] @ token))) / sigma
                weights = (-(far**2) / 2).softmax(0)
                place = weights @ places
                want = want + (weights @ bare.v[b, h // 2, :length]).pow(2).sum()
    assert close(loss, want)
    for one, other in zip(slopes, torch.autograd.grad(want, leaves), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def _call(p: dict[str, Tensor], queries: Positions, keys: Tensor) -> Call:
    bare, _ = _drawn(keys)
    return replace(bare.call, params=p, queries=queries)


def test_call_by_call() -> None:
    bare, p = _drawn()
    whole, state, found = bare.run(MonotonicLocationAttention(), "reference", params=p)[0], State(), []
    for first, stop in ((0, 2), (2, 3), (3, 6)):
        call = replace(_call(p, Positions.row(first, stop - first), TEXT), state=state)
        found.append(MonotonicLocationAttention().attend((bare.q[:, :, first:stop], bare.k, bare.v), call))
    assert close(torch.cat(found, 2), whole)


def test_a_token_of_padding_moves_nothing() -> None:
    bare, p = _drawn()
    filled = torch.tensor([[True] * 6, [False, False, True, True, True, True]])[:, None]
    call = _call(p, Positions.row(0, 6, is_filled=filled), TEXT)
    found = MonotonicLocationAttention().attend((bare.q, bare.k, bare.v), call)
    for h in range(4):
        want = _looks(bare.q[1, h, 2:], bare.v[1, h // 2, :8], p["step"][h], p["width"][h], "any")
        assert close(found[1, h, 2:], want)


def test_a_source_of_nothing_but_padding_gives_nothing() -> None:
    text = TEXT.clone()
    text[1] = False
    bare, p = _drawn(text)
    found, _ = bare.run(MonotonicLocationAttention(), "reference", params=p)
    assert not bool(found[1].any())
    assert bool(found[0].isfinite().all())


def test_in_a_model_step_by_step_and_padding_is_no_part_of_the_source() -> None:
    goes_on_in_a_model(MonotonicLocationAttention())


def test_the_start() -> None:
    layer = Layer(2, 4, 2, 100, 8, 25)
    found, again = MonotonicLocationAttention().parameters(layer), MonotonicLocationAttention().parameters(layer)
    assert {name: tuple(x.shape) for name, x in found.items()} == {"step": (4, 100), "width": (4, 100)}
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["step"], MonotonicLocationAttention().parameters(replace(layer, number=0))["step"])
    drawn = torch.rand(4, 100, generator=torch.Generator().manual_seed(2))
    assert close(found["step"], (2 * drawn - 1) * math.sqrt(6 / 104))
    assert not torch.equal(found["step"], found["width"])


def test_errors() -> None:
    bare, p = _drawn()
    assert MonotonicLocationAttention().idle(Bare().call)
    assert not MonotonicLocationAttention().idle(bare.call)
    with pytest.raises(FieldError, match=r"MonotonicLocationAttention.steps = 'two': must be 'any' or 'one'"):
        MonotonicLocationAttention("two")
    state, wanted = State(), r"layer 0: goes on within a text, and does not know where the token before looked"
    for first, stop in ((0, 2), (3, 6)):
        call = replace(_call(p, Positions.row(first, stop - first), TEXT), state=state)
        given = (bare.q[:, :, first:stop], bare.k, bare.v)
        if first:
            with pytest.raises(SiteError, match=wanted):
                MonotonicLocationAttention().attend(given, call)
            with pytest.raises(SiteError, match=wanted):
                MonotonicLocationAttention().attend(given, replace(call, state=State()))
        else:
            MonotonicLocationAttention().attend(given, call)
