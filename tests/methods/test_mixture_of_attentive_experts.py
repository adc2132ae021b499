"""MixtureOfAttentiveExperts against mixtures of experts, each of which is all heads but one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Call, FieldError, Layer, SiteError
from heedful.conformance.tolerances import close, close_model
from heedful.core.positions import Positions
from heedful.methods import MixtureOfAttentiveExperts
from tests.by_hand import block_inputs, causal_map, heads_of, llama_states

B, H, N, D, E, U = 2, 5, 4, 3, 6, 7
LAYER = Layer(1, H, H, D, D, E)
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights() -> dict[str, Tensor]:
    return {"in": draw(1, U, E), "in_bias": draw(2, U), "out": draw(3, H, U), "out_bias": draw(4, H)}


def call(params: dict[str, Tensor], **more: Any) -> Call:
    places = Positions.row(0, N)
    return Call(0, 1, "layer", H, H, places, places, 1.0, hidden=draw(7, B, N, E), params=params, **more)


def shares(x: Tensor, p: dict[str, Tensor]) -> list[float]:
    """How much each expert is worth to a token."""
    inner = [math.tanh(float(sum(row * x)) + float(c)) for row, c in zip(p["in"], p["in_bias"], strict=True)]
    powers = [
        math.exp(sum(float(w) * y for w, y in zip(row, inner, strict=True)) + float(c))
        for row, c in zip(p["out"], p["out_bias"], strict=True)
    ]
    return [power / sum(powers) for power in powers]


def expert(heads: Tensor, number: int) -> Tensor:
    """What expert `number` makes of one token's heads `[h d]`."""
    count = len(heads)
    return torch.stack([x * (0 if i == number else count / (count - 1)) for i, x in enumerate(heads)])


@pytest.mark.parametrize("more", [{}, {"training": True}, {"training": True, "forward": 6}, {"forward": 4}])
def test_every_token_mixes_its_experts(more: dict[str, Any]) -> None:
    p, heads = weights(), draw(9, B, H, N, D)
    here = call(p, **more)
    found = MixtureOfAttentiveExperts(U, every=3).mix(heads, here)
    for b in range(B):
        for n in range(N):
            gate = shares(here.hidden[b, n], p)  # type: ignore[index]
            want = sum(g * expert(heads[b, :, n], i) for i, g in enumerate(gate))
            assert close(found[b, :, n], want)


@pytest.mark.parametrize(("seed", "forward", "layer"), [(0, 1, 0), (0, 2, 3), (5, 1, 0)])
def test_in_most_forwards_of_training_each_token_draws_an_expert(seed: int, forward: int, layer: int) -> None:
    p, heads = {name: w.requires_grad_() for name, w in weights().items()}, draw(9, B, H, N, D)
    here = replace(call(p, training=True, forward=forward), layer=layer)
    found = MixtureOfAttentiveExperts(U, 3, seed).mix(heads, here)
    chances = torch.rand(B, N, 1, generator=torch.Generator().manual_seed(1_000_003 * seed + 1009 * forward + layer))
    left = set()
    for b in range(B):
        for n in range(N):
            below, number = 0.0, -1
            for i, g in enumerate(shares(here.hidden[b, n], weights())):  # type: ignore[index]
                below += g
                if float(chances[b, n]) < below:
                    number = i
                    break
            assert close(found[b, :, n], expert(heads[b, :, n], number))
            left.add(number)
    assert len(left) > 1
    assert not found.requires_grad


def test_a_chance_that_is_a_sum_of_shares_falls_to_the_next_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 0.5))
    gate = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]])
    found = MixtureOfAttentiveExperts()._drawn(gate, call({}))
    assert found.tolist() == [[[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]


def test_the_first_steps_of_training() -> None:
    """The first forward trains model and gate; the next one the model alone."""
    model = models.tiny("llama").train()
    method = MixtureOfAttentiveExperts(U, every=2)
    with attach(model, method) as run:
        mine = {name: p.detach().clone().requires_grad_() for name, p in run.state_dict().items()}
        with block_inputs(model) as inputs:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
                heads, x = heads_of(causal_map(rotate(q), rotate(k)), v), inputs[-1]
                p = {name.split(".")[2]: w for name, w in mine.items() if name.split(".")[1] == str(layer)}
                gate = ((x @ p["in"].T + p["in_bias"]).tanh() @ p["out"].T + p["out_bias"]).softmax(-1)
                experts = torch.stack(
                    [torch.stack([expert(token, i) for i in range(4)]) for token in heads.transpose(1, 2).flatten(0, 1)]
                )  # [b*n experts h d]
                return (gate.flatten(0, 1)[:, :, None, None] * experts).sum(1).unflatten(0, (2, -1)).transpose(1, 2)

            logits = model.lm_head(llama_states(model, IDS, attend))[:, :-1]
            want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        slopes = torch.autograd.grad(want, list(mine.values()))
        found = run(IDS, labels=IDS, use_cache=False).loss
        assert close_model(found.detach(), want.detach())
        found.backward()
        for p, slope in zip(run.parameters(), slopes, strict=True):
            assert close_model(p.grad, slope)
            assert bool(slope.any())
            p.grad = None
        model.zero_grad()
        run(IDS, labels=IDS, use_cache=False).loss.backward()
        assert all(p.grad is None for p in run.parameters())
        assert all(bool(layer.self_attn.v_proj.weight.grad.any()) for layer in model.model.layers)


def test_the_start() -> None:
    found, again = (MixtureOfAttentiveExperts(50).parameters(LAYER) for _ in range(2))
    shapes = {"in": (50, E), "in_bias": (50,), "out": (H, 50), "out_bias": (H,)}
    assert {name: tuple(x.shape) for name, x in found.items()} == shapes
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not torch.equal(found["in"], MixtureOfAttentiveExperts(50).parameters(replace(LAYER, number=0))["in"])
    for name, fan in (("in", E), ("in_bias", E), ("out", 50), ("out_bias", 50)):
        bound, x = 1 / math.sqrt(fan), found[name]
        assert float(x.abs().max()) <= bound
        if x.numel() >= 50:
            assert float(x.max()) > 0.9 * bound
            assert float(x.min()) < -0.9 * bound
    drawn = torch.rand(50, E, generator=torch.Generator().manual_seed(1))
    assert close(found["in"], (2 * drawn - 1) / math.sqrt(E))
    assert float(found["out_bias"].abs().max()) > 0.3 / math.sqrt(50)
    assert float(found["in_bias"].min()) < 0 < float(found["in_bias"].max())


def test_two_heads_are_enough_and_one_stays_as_it_is() -> None:
    method = MixtureOfAttentiveExperts(3)
    assert method.parameters(replace(LAYER, heads=2))["out"].shape == (2, 3)
    assert method.parameters(replace(LAYER, heads=1)) == {}
    assert method.idle(replace(call({}), heads=1))
    assert not method.idle(replace(call({}), heads=2))


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"MixtureOfAttentiveExperts.units = 0: must be 1 or more"):
        MixtureOfAttentiveExperts(0)
    with pytest.raises(FieldError, match=r"MixtureOfAttentiveExperts.every = 0: must be 1 or more"):
        MixtureOfAttentiveExperts(every=0)
    assert MixtureOfAttentiveExperts(1, 1).units == 1
    with pytest.raises(SiteError, match="layer 0: the block is not handed hidden states"):
        MixtureOfAttentiveExperts().gate(replace(call(weights()), hidden=None))
