"""Mega against its recurrence, token by token."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Causal, Layer, Mask
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods import Mega
from heedful.methods.mechanisms.recurrent import _averages
from tests.by_hand import in_pieces

N, E, Z, A, REACH = 9, 6, 4, 3, 5


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def _by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One text `[n e]` without padding."""
    damping, decay = _sigmoid(p["damping"]), _sigmoid(p["decay"])
    state, rows = torch.zeros_like(damping), []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for i, token in enumerate(x):
        state = damping * p["expand"] * token[:, None] + (1 - damping * decay) * state
        average = (p["shrink"] * math.sqrt(1 / A) * state).sum(-1)
        m = _silu(average + p["skip"] * token)
        base = p["base"] @ m + p["base_bias"]
        update, z, reset, direct = base[:E], base[E : E + Z], base[E + Z : 3 * E + Z], base[3 * E + Z :]
        z = _silu(z)
        query, key = (z * p["turn"][j] + p["turn_bias"][j] for j in (0, 1))
        keys.append(key)
        values.append(_silu(p["value"] @ token + p["value_bias"]))
        scores = [query @ k / math.sqrt(Z) + p["distance"][min(i - j, REACH - 1)] for j, k in enumerate(keys)]
        weights = torch.stack(scores).softmax(0)
        mixed = sum(w * v for w, v in zip(weights, values, strict=True))
        new = _silu(direct + p["out"] @ (mixed * _silu(reset)) + p["out_bias"])
        rows.append(_sigmoid(update) * (new - token))
    return torch.stack(rows)


def _drawn() -> tuple[Mega, Tensor, dict[str, Tensor]]:
    method, draw = Mega(Z, A, REACH), torch.Generator().manual_seed(1)
    given = method.parameters(Layer(0, 2, 2, 3, 3, E))
    p = {name: (w.double() + torch.randn(w.shape, generator=draw) / 2).requires_grad_() for name, w in given.items()}
    return method, torch.randn(2, N, E, generator=draw, dtype=torch.float64).requires_grad_(), p


def _call(p: dict[str, Tensor], first: int = 0, n: int = N, text: Tensor | None = None) -> Call:
    queries = Positions.row(first, n, is_filled=None if text is None else text[:, None, first : first + n])
    return Call(0, 1, "alone", 2, 2, queries, Positions.row(0, first + n), 1.0, mask=Mask((Causal(),)), params=p)


@pytest.fixture(params=[2, 16], autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that look at once."""
    monkeypatch.setattr(_averages, "PIECE", 1)
    monkeypatch.setattr(_averages, "LEAST", request.param)


def test_who_sees_nothing_finds_nothing() -> None:
    x, seen = torch.ones(1, N, 2), torch.arange(N)[None] >= 3
    found = _averages.looks(x, x, x, seen, _call({"distance": torch.zeros(N)}))
    assert torch.equal(found, x * seen[..., None])


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_forward_loss_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_averages, "CHUNK", chunk)
    method, x, p = _drawn()
    found, wanted = method.attend(x, _call(p)), torch.stack([_by_hand(row, p) for row in x])
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


@pytest.mark.parametrize("chunk", [2, 64])
def test_call_by_call_and_padded(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_averages, "CHUNK", chunk)
    method, x, p = _drawn()
    text = torch.ones(2, N, dtype=torch.bool)
    text[0, :4] = False
    state, found = State(), []
    for first, stop in itertools.pairwise((0, 5, 6, 9)):
        call = replace(_call(p, first, stop - first, text), state=state)
        found.append(method.attend(x[:, first:stop], call))
    whole = torch.cat(found, 1)
    assert close(whole[0, 4:], _by_hand(x[0, 4:], p))
    assert close(whole[1], _by_hand(x[1], p))
    assert state.cache["averages"].shape == (2, E, A)


def test_in_a_model_step_by_step_and_after_a_crop() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, Mega(8, 3, 5)) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        parts, cache = in_pieces(run, ids, (9, 1, 6))
        assert close_model(parts, whole)
        cache.crop(-4)
        with pytest.raises(SiteError, match="layer 0: averages go on from token 12, and those kept are not"):
            run(input_ids=ids[:, 12:], use_cache=True, **{CACHE: cache})


def test_the_start() -> None:
    layer = Layer(0, 4, 4, 64, 64, 256)
    p, again = Mega(64, 16, 128).parameters(layer), Mega(64, 16, 128).parameters(layer)
    shapes = {
        "value": (512, 256), "value_bias": (512,), "base": (64 + 1024, 256), "base_bias": (64 + 1024,),
        "out": (256, 512), "out_bias": (256,), "turn": (2, 64), "turn_bias": (2, 64), "distance": (128,),
        "damping": (256, 16), "decay": (256, 16), "expand": (256, 16), "shrink": (256, 16), "skip": (256,),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in p.items()} == shapes
    assert all(torch.equal(x, again[name]) for name, x in p.items())
    assert not torch.equal(p["base"], Mega().parameters(replace(layer, number=1))["base"])
    spreads = {"value": 0.02, "base": 0.02, "out": 0.02, "damping": 0.2, "decay": 0.2, "shrink": 1.0, "skip": 1.0}
    for name, spread in spreads.items():
        assert 0.85 * spread < float(p[name].std()) < 1.15 * spread
    for name in ("turn", "distance"):
        assert 0.015 < float(p[name].std()) < 0.025
    signs = torch.tensor([1.0, -1.0] * 8)
    assert float((p["expand"] - signs).abs().max()) < 0.1
    assert 0.018 < float((p["expand"] - signs).std()) < 0.022
    assert not any(bool(p[name].any()) for name in p if name.endswith("bias"))


def test_errors() -> None:
    method, x, p = _drawn()
    with pytest.raises(SiteError, match="layer 0: Mega's averages need a causal call"):
        method.attend(x, replace(_call(p), mask=Mask()))
    with pytest.raises(SiteError, match="go on from token 3"):
        method.attend(x[:, :2], replace(_call(p, 3, 2), state=State()))
    for settings in ({"shared": 0}, {"averages": 0}, {"reach": 0}):
        with pytest.raises(FieldError, match=r"Mega\..* = 0: must be 1 or more"):
            Mega(**settings)
