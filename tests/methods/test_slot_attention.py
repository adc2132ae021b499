"""Slot attention: rounds, gates and what goes back to tokens, slot by slot and token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.methods import SlotAttention
from tests.methods.sliced import E, N, agrees, call, masked

LAYER = Layer(0, 4, 4, 6, 6, E)


def _norm(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.sum() / E
    return centred / (centred.square().sum() / E + 1e-3).sqrt() * p[f"{name}_norm"] + p.get(f"{name}_shift", 0)


def _gru(x: Tensor, h: Tensor, p: dict[str, Tensor]) -> Tensor:
    """A gated recurrent unit, whose reset gate acts behind the map of what it forgets."""
    reset, update, new = (p["gate_input"] @ x + p["gate_input_bias"]).split(E)
    reset_h, update_h, new_h = (p["gate_slot"] @ h + p["gate_slot_bias"]).split(E)
    z = 1 / (1 + (-(update + update_h)).exp())
    return (1 - z) * torch.tanh(new + new_h / (1 + (-(reset + reset_h)).exp())) + z * h


def _by_hand(x: Tensor, p: dict[str, Tensor], slots: int, rounds: int, number: int = 0) -> Tensor:
    noise = torch.randn(slots, E, generator=torch.Generator().manual_seed(number))
    inputs = [_norm(token, p, "input") for token in x]
    keys, values = [p["key"] @ y for y in inputs], [p["value"] @ y for y in inputs]
    held = [p["mean"] + p["spread"].exp() * n for n in noise]
    weights: list[list[Tensor]] = []
    for _ in range(rounds):
        asked = [p["query"] @ _norm(s, p, "slot") for s in held]
        raw = [[((q * k).sum() / E**0.5).exp() for q in asked] for k in keys]
        weights = [[w / sum(row) for w in row] for row in raw]
        for j in range(slots):
            mine = [row[j] + 1e-8 for row in weights]
            update = sum(w * v for w, v in zip(mine, values, strict=True)) / sum(mine)
            s = _gru(update, held[j], p)
            inner = (p["up"] @ _norm(s, p, "inner") + p["up_bias"]).clamp(min=0)
            held[j] = s + p["down"] @ inner + p["down_bias"]
    return torch.stack([p["out"] @ sum(w * s for w, s in zip(row, held, strict=True)) for row in weights])


@pytest.mark.parametrize(("slots", "rounds"), [(3, 2), (1, 1), (5, 3)])
def test_slots_compete_for_tokens_round_by_round(slots: int, rounds: int) -> None:
    if slots > 1:
        agrees(SlotAttention(slots, rounds, 9), lambda x, p: _by_hand(x, p, slots, rounds))
    p = {name: x.double() for name, x in SlotAttention(slots, rounds, 9).parameters(LAYER).items()}
    x = torch.randn(2, N, E, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    second = replace(call(p), layer=1)
    want = torch.stack([_by_hand(one, p, slots, rounds, 1) for one in x])
    assert close(SlotAttention(slots, rounds, 9).attend(x, second), want)


def test_a_slot_that_nobody_wants_takes_the_mean_of_all() -> None:
    scores = torch.zeros(1, N, 2, dtype=torch.float64)
    scores[..., 1] = -200.0
    scores[:, 0, 1] = -190.0
    weights, shares = SlotAttention()._weighed(scores)
    assert close(weights[..., 0], torch.ones(1, N, dtype=torch.float64))
    assert close(shares, torch.full((1, N, 2), 1 / N, dtype=torch.float64))


def test_other_places_of_tokens_are_the_same_in_other_places() -> None:
    p = SlotAttention(3).parameters(LAYER)
    x = torch.randn(1, N, E, dtype=torch.float64)
    p = {name: w.double() for name, w in p.items()}
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert close(SlotAttention(3).attend(x[:, order], call(p)), SlotAttention(3).attend(x, call(p))[:, order])


def test_an_image_model_is_served_and_learns() -> None:
    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    with attach(model, SlotAttention(3)) as run:
        run(**inputs, output_hidden_states=True).hidden_states[-1].square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in run.parameters())
        assert run(**inputs).logits.dtype == torch.float32


def test_the_start() -> None:
    layer = Layer(0, 4, 4, 64, 64, 256)
    first, again = SlotAttention(units=64).parameters(layer), SlotAttention(units=64).parameters(layer)
    other = SlotAttention(units=64).parameters(replace(layer, number=1))
    e = 256
    assert {name: tuple(x.shape) for name, x in first.items()} == {
        **dict.fromkeys(("query", "key", "value", "out"), (e, e)),
        **dict.fromkeys(("mean", "spread", "down_bias"), (e,)),
        **dict.fromkeys(("input_norm", "slot_norm", "inner_norm", "input_shift", "inner_shift"), (e,)),
        **dict.fromkeys(("gate_input", "gate_slot"), (3 * e, e)),
        **dict.fromkeys(("gate_input_bias", "gate_slot_bias"), (3 * e,)),
        "up": (64, e), "up_bias": (64,), "down": (e, 64),
    }  # fmt: skip
    for name, x in first.items():
        assert torch.equal(x, again[name])
        if name.endswith("_norm"):
            assert bool((x == 1).all())
        elif name.endswith("_shift"):
            assert not bool(x.any())
        else:
            bound = 64**-0.5 if name.startswith("down") else 256**-0.5
            assert not torch.equal(x, other[name])
            assert 0.9 * bound < float(x.max()) <= bound
            assert -bound <= float(x.min()) < -0.9 * bound


def test_errors() -> None:
    for name in ("slots", "rounds", "units"):
        with pytest.raises(FieldError, match=rf"SlotAttention\.{name} = 0: must be 1 or more"):
            SlotAttention(**{name: 0})
    assert SlotAttention() == SlotAttention(7, 3, 128)
    with pytest.raises(SiteError, match="layer 0: slots take from all tokens, and there is a mask"):
        SlotAttention().attend(torch.zeros(1, N, E), masked({}))
