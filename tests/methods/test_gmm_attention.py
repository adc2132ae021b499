"""GMM attention, against its Gaussians token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import FieldError, Layer, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.mask import Padding
from heedful.core.positions import Positions
from heedful.core.state import State, Until
from heedful.methods import GMMAttention
from tests.methods.walking import goes_on_in_a_model

COMPONENTS, UNITS = 3, 5
TEXT = torch.ones(2, 13, dtype=torch.bool)
TEXT[1, 8:] = False
SHAPES = {"in": (4, UNITS, 8), "in_bias": (4, UNITS), "out": (4, 9, UNITS), "out_bias": (4, 9)}
METHOD = GMMAttention(COMPONENTS, UNITS)


def _drawn() -> tuple[Bare, dict[str, Tensor]]:
    bare = Bare(Shape(q=6, k=13), dtype=torch.float64, rules=(Padding(TEXT),))
    bare.call = replace(bare.call, cross=True, queries=Positions.row(0, 6))
    draw = torch.Generator().manual_seed(1)
    return bare, {name: torch.randn(shape, generator=draw, dtype=torch.float64) / 2 for name, shape in SHAPES.items()}


def _plus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def _looks(q: Tensor, v: Tensor, p: dict[str, Tensor], h: int) -> Tensor:
    """What the tokens of one head get of a source of nothing but `v`."""
    means, out = [torch.zeros((), dtype=q.dtype)] * COMPONENTS, []
    for token in q:
        told = p["out"][h] @ torch.tanh(p["in"][h] @ token + p["in_bias"][h]) + p["out_bias"][h]
        shares = told[:COMPONENTS].softmax(0)
        means = [m + _plus(told[COMPONENTS + c]) for c, m in enumerate(means)]
        found = torch.zeros_like(v[0])
        for j, value in enumerate(v):
            for c, m in enumerate(means):
                sigma = _plus(told[2 * COMPONENTS + c])
                z = torch.sqrt(2 * math.pi * sigma**2)
                found = found + shares[c] / z * torch.exp(-((j - m) ** 2) / (2 * sigma**2)) * value
        out.append(found)
    return torch.stack(out)


def _by_hand(bare: Bare, p: dict[str, Tensor]) -> Tensor:
    heads = [_looks(bare.q[b, h], bare.v[b, h // 2, : int(TEXT[b].sum())], p, h) for b in range(2) for h in range(4)]
    return torch.stack(heads).view_as(bare.q)


def test_heads_go_through_the_source() -> None:
    bare, p = _drawn()
    assert close(bare.run(METHOD, "reference", params=p)[0], _by_hand(bare, p))


def test_the_first_steps_loss_and_gradient() -> None:
    bare, p = _drawn()
    leaves = [*p.values(), bare.q, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    losses = [x.pow(2).sum() for x in (bare.run(METHOD, "reference", params=p)[0], _by_hand(bare, p))]
    assert close(losses[0].detach(), losses[1].detach())
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_call_by_call_and_padding_moves_nothing() -> None:
    bare, p = _drawn()
    whole, state, found = _by_hand(bare, p), State(), []
    for first, stop in ((0, 2), (2, 3), (3, 6)):
        call = replace(bare.call, params=p, queries=Positions.row(first, stop - first), state=state)
        found.append(METHOD.attend((bare.q[:, :, first:stop], bare.k, bare.v), call))
    assert close(torch.cat(found, 2), whole)
    filled = torch.tensor([[True] * 6, [False, False, True, True, True, True]])[:, None]
    call = replace(bare.call, params=p, queries=Positions.row(0, 6, is_filled=filled))
    padded = METHOD.attend((bare.q, bare.k, bare.v), call)
    for h in range(4):
        assert close(padded[1, h, 2:], _looks(bare.q[1, h, 2:], bare.v[1, h // 2, :8], p, h))


def test_where_a_model_counts_from_0_in_every_call() -> None:
    bare, p = _drawn()
    whole, state, found = _by_hand(bare, p), State(), []
    for first, stop in ((0, 2), (2, 3), (3, 6)):
        call = replace(bare.call, params=p, queries=Positions.row(0, stop - first), state=state)
        found.append(METHOD.attend((bare.q[:, :, first:stop], bare.k, bare.v), call))
    assert close(torch.cat(found, 2), whole)
    state.cache["end"] = Until(state.cache["end"]).crop(5)
    with pytest.raises(SiteError, match="layer 0: goes on within a text, and does not know where"):
        METHOD.attend((bare.q, bare.k, bare.v), replace(call, queries=Positions.row(0, 6)))


def test_heads_that_have_gone_past_the_end_see_nothing_and_narrow_values_stay_narrow() -> None:
    bare, p = _drawn()
    call = replace(bare.call, params=p, mask=replace(bare.call.mask, rules=()))
    assert float(METHOD.weights(bare.q, 13, call).sum(-1).min()) > 0
    far = {**p, "out_bias": p["out_bias"] + torch.tensor([0.0] * 3 + [30.0] * 3 + [0.0] * 3)}
    gone = METHOD.weights(bare.q, 13, replace(call, params=far, state=State()))
    assert close(1 + gone, torch.ones_like(gone))
    given = tuple(x.bfloat16() for x in (bare.q, bare.k, bare.v))
    assert METHOD.attend(given, replace(call, state=State())).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_in_a_model_step_by_step_and_padding_is_no_part_of_the_source() -> None:
    goes_on_in_a_model(GMMAttention())


def test_the_start() -> None:
    layer = Layer(2, 4, 2, 100, 8, 25)
    found = GMMAttention(2, 50).parameters(layer)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "in": (4, 50, 100), "in_bias": (4, 50), "out": (4, 6, 50), "out_bias": (4, 6),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(2)
    for name, fan in (("in", 100), ("in_bias", 100), ("out", 50)):
        assert close(found[name], (2 * torch.rand(found[name].shape, generator=draw) - 1) / math.sqrt(fan))
    for head in found["out_bias"]:
        steps, widths = (math.log(math.exp(x) - 1) for x in (1, 10))
        assert close(head, torch.tensor([0.0, 0.0, steps, steps, widths, widths]))
    assert not torch.equal(found["in"], GMMAttention(2, 50).parameters(replace(layer, number=0))["in"])
    assert (GMMAttention().components, GMMAttention().units) == (5, 128)


def test_errors() -> None:
    bare, _ = _drawn()
    assert GMMAttention().idle(Bare().call)
    assert not GMMAttention().idle(bare.call)
    assert GMMAttention(1, 1).units == 1
    with pytest.raises(FieldError, match=r"GMMAttention.components = 0: must be 1 or more"):
        GMMAttention(0)
    with pytest.raises(FieldError, match=r"GMMAttention.units = 0: must be 1 or more"):
        GMMAttention(units=0)
