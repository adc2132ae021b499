"""SeqBoat against its recurrence and its gathered tokens, one by one."""

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
from heedful.methods import SeqBoat
from heedful.methods.mechanisms.recurrent import _averages
from tests.by_hand import in_pieces

N, E, Z, A, WINDOW, REACH = 11, 6, 4, 3, 2, 5


def _silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def _by_hand(x: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """One text `[n e]` without padding, and who attends."""
    damping, decay = _sigmoid(p["damping"]), _sigmoid(p["decay"])
    state, rows = torch.zeros_like(damping), []
    attend: list[int] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for i, token in enumerate(x):
        state = damping * p["expand"] * token[:, None] + (1 - damping * decay) * state
        m = _silu((p["shrink"] * math.sqrt(1 / A) * state).sum(-1) + p["skip"] * token)
        told = p["direct"] @ m + p["direct_bias"]
        against, chance = torch.softmax(told[:2] / p["temperature"].exp(), 0)
        out = told[2:]
        if chance > against:
            base = _silu(p["base"] @ m + p["base_bias"])
            z, reset, value = base[:Z], base[Z : Z + 2 * E], base[Z + 2 * E :]
            query, key = (z * p["turn"][j] + p["turn_bias"][j] for j in (0, 1))
            attend.append(i)
            keys.append(key)
            values.append(value)
            seen = range(max(0, len(attend) - 1 - WINDOW), len(attend))
            scores = [query @ keys[j] / math.sqrt(Z) + p["distance"][min(i - attend[j], REACH - 1)] for j in seen]
            weights = torch.stack(scores).softmax(0)
            mixed = sum(w * values[j] for w, j in zip(weights, seen, strict=True))
            out = out + chance * (p["out"] @ (mixed * reset) + p["out_bias"])
        rows.append(_silu(out))
    return torch.stack(rows), attend


def _drawn() -> tuple[SeqBoat, Tensor, dict[str, Tensor]]:
    method, draw = SeqBoat(Z, A, WINDOW, REACH), torch.Generator().manual_seed(3)
    given = method.parameters(Layer(0, 2, 2, 3, 3, E))
    p = {name: w.double() + torch.randn(w.shape, generator=draw) / 2 for name, w in given.items()}
    p["direct"][:2] *= 4  # so that some attend and some do not
    p["direct_bias"][:2] = torch.tensor([0.0, 0.5])
    p = {name: w.requires_grad_() for name, w in p.items()}
    return method, torch.randn(2, N, E, generator=draw, dtype=torch.float64).requires_grad_(), p


def _call(p: dict[str, Tensor], first: int = 0, n: int = N, text: Tensor | None = None) -> Call:
    queries = Positions.row(first, n, is_filled=None if text is None else text[:, None, first : first + n])
    return Call(0, 1, "alone", 2, 2, queries, Positions.row(0, first + n), 1.0, mask=Mask((Causal(),)), params=p)


@pytest.fixture(params=[2, 16], autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that look at once."""
    monkeypatch.setattr(_averages, "PIECE", 1)
    monkeypatch.setattr(_averages, "LEAST", request.param)


def test_forward_loss_and_gradients() -> None:
    method, x, p = _drawn()
    by_hand = [_by_hand(row, p) for row in x]
    for _, attend in by_hand:
        assert WINDOW + 1 < len(attend) < N  # or the window and the gate would not be seen
    found, wanted = method.attend(x, _call(p)), torch.stack([row for row, _ in by_hand])
    assert close(found, wanted)
    losses = [(y - 1).pow(2).mean() for y in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, [x, *p.values()]) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_call_by_call_and_padded() -> None:
    method, x, p = _drawn()
    text = torch.ones(2, N, dtype=torch.bool)
    text[0, :4] = False
    state, found = State(), []
    for first, stop in itertools.pairwise((0, 5, 6, N)):
        call = replace(_call(p, first, stop - first, text), state=state)
        found.append(method.attend(x[:, first:stop], call))
    whole = torch.cat(found, 1)
    assert close(whole[0, 4:], _by_hand(x[0, 4:], p)[0])
    assert close(whole[1], _by_hand(x[1], p)[0])
    assert state.cache["averages"].shape == (2, E, A)


def test_a_gate_of_a_half_is_shut() -> None:
    method = SeqBoat()
    routes = torch.tensor([[[0.0, 0.0], [0.0, 0.1], [0.1, 0.0], [0.0, 9.0]]])
    found = method.gate(routes)[0].tolist()
    assert found[0] == found[2] == 0
    assert math.isclose(found[1], 1 / (1 + math.exp(-0.1)), rel_tol=1e-5)
    assert found[3] > 0.99


def test_in_a_model_step_by_step_and_after_a_crop() -> None:
    model = models.tiny("llama").eval()
    ids = models.tiny_inputs(model, length=16)["input_ids"]
    with attach(model, SeqBoat(8, 3, 4, 5)) as run, torch.no_grad():
        whole = run(input_ids=ids).logits
        parts, cache = in_pieces(run, ids, (9, 1, 6))
        assert close_model(parts, whole)
        cache.crop(-4)
        with pytest.raises(SiteError, match="layer 0: averages go on from token 12"):
            run(input_ids=ids[:, 12:], use_cache=True, **{CACHE: cache})


def test_the_start() -> None:
    layer = Layer(0, 4, 4, 64, 64, 256)
    p, again = SeqBoat(reach=500).parameters(layer), SeqBoat(reach=500).parameters(layer)
    shapes = {
        "direct": (258, 256), "direct_bias": (258,), "base": (64 + 1024, 256), "base_bias": (64 + 1024,),
        "out": (256, 512), "out_bias": (256,), "turn": (2, 64), "turn_bias": (2, 64), "distance": (500,),
        "temperature": (1,),
        "damping": (256, 16), "decay": (256, 16), "expand": (256, 16), "shrink": (256, 16), "skip": (256,),
    }  # fmt: skip
    assert {name: tuple(x.shape) for name, x in p.items()} == shapes
    assert all(torch.equal(x, again[name]) for name, x in p.items())
    assert not torch.equal(p["base"], SeqBoat().parameters(replace(layer, number=1))["base"])
    for name in ("direct", "base", "out", "distance"):
        assert 0.017 < float(p[name].std()) < 0.023
    assert close(p["temperature"].exp(), torch.tensor([16.0]))
    assert not any(bool(p[name].any()) for name in p if name.endswith("bias"))


def test_errors() -> None:
    method, x, p = _drawn()
    with pytest.raises(SiteError, match="layer 0: SeqBoat's averages need a causal call"):
        method.attend(x, replace(_call(p), mask=Mask()))
    for settings in ({"shared": 0}, {"averages": 0}, {"window": 0}, {"reach": 0}):
        with pytest.raises(FieldError, match=r"SeqBoat\..* = 0: must be 1 or more"):
            SeqBoat(**settings)
