"""Attentive Eraser: what marked places see in the redirected run, step by step, and what the two runs make together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heedful import Prompt, attach, decode, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.method import Stack
from heedful.methods import AttentiveEraser

MARKED = (2, 3, 6)
ROLES = {"marked": ((2, 4), (6, 7))}


class _Attention(nn.Module):
    """Two heads of width 4, over its own sequence or another."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        other = x if context is None else context
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q(x), self.k(other), self.v(other)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Denoiser(nn.Module):
    """Self-attention, then cross-attention, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(_Attention() for _ in range(2))
        self.cross = nn.ModuleList(_Attention() for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for own, cross in zip(self.own, self.cross, strict=True):
            x = x + own(x)
            x = x + cross(x, context=context)
        return x


def _drawn() -> tuple[_Denoiser, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    model = _Denoiser()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.6, generator=draw)
    return model, torch.randn(2, 9, 8, generator=draw), torch.randn(2, 8, 8, generator=draw)


def _by_hand(part: _Attention, x: Tensor, factor: float) -> Tensor:
    """Self-attention, one query at a time: no marked key, and marked queries' scores times the factor."""
    q, k, v, out = part.q(x), part.k(x), part.v(x), torch.zeros_like(x)
    for b in range(len(x)):
        for h in (slice(0, 4), slice(4, 8)):
            for i in range(9):
                seen = [j for j in range(9) if j not in MARKED]
                score = torch.stack([q[b, i, h] @ k[b, j, h] / 2 for j in seen])
                weights = (score * (factor if i in MARKED else 1.0)).softmax(0)
                out[b, i, h] = sum(w * v[b, j, h] for w, j in zip(weights, seen, strict=True))
    return out


def _redirected(method: AttentiveEraser) -> Stack:
    return method.variants(Prompt((1,)))["redirected"][1]


@torch.no_grad()
def test_nobody_sees_what_is_to_go_and_it_looks_about_with_little_preference_at_first() -> None:
    model, x, context = _drawn()
    method = AttentiveEraser(u=0.2, early=0.5)
    expected = []
    for factor in (0.2, 0.2, 1.0, 1.0):
        wanted = x
        for own, cross in zip(model.own, model.cross, strict=True):
            wanted = wanted + _by_hand(own, wanted, factor)  # type: ignore[arg-type]
            wanted = wanted + cross(wanted, context=context)
        expected.append(wanted)
    with attach(model, _redirected(method), roles=ROLES, inputs=(x, context)) as run:
        for step, wanted in enumerate(expected):
            with run.denoising(step, of=4):
                assert close_model(run(x, context), wanted)
        assert close_model(run(x, context), expected[0]), "told of no steps, every one is early"


@torch.no_grad()
def test_only_the_layers_that_are_named_look_away() -> None:
    model, x, context = _drawn()
    method = AttentiveEraser(u=0.6, early=1.0, layers=(2,))
    wanted = x + model.own[0](x)
    wanted = wanted + model.cross[0](wanted, context=context)
    wanted = wanted + _by_hand(model.own[1], wanted, 0.6)  # type: ignore[arg-type]
    wanted = wanted + model.cross[1](wanted, context=context)
    with attach(model, _redirected(method), roles=ROLES, inputs=(x, context)) as run:
        assert close_model(run(x, context), wanted)


@torch.no_grad()
def test_a_picture_that_is_marked_whole_is_looked_at_evenly() -> None:
    model, x, _ = _drawn()
    with attach(model.own[0], _redirected(AttentiveEraser()), roles={"marked": ((0, 9),)}, inputs=(x,)) as run:
        even = model.own[0].v(x).mean(1, keepdim=True).expand_as(x)  # type: ignore[operator]
        assert close_model(run(x), even)


def test_the_guided_prediction_goes_on_beyond_the_redirected_run() -> None:
    plain, redirected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.5, 3.0, 0.0])
    given = {"plain": plain, "redirected": redirected}
    assert close(AttentiveEraser(s=2.0).combine(given), torch.tensor([0.0, 4.0, 0.0]))
    assert close(AttentiveEraser(s=1.0).combine(given), redirected)
    assert close(AttentiveEraser().combine(given), torch.tensor([-3.5, 11.0, 0.0]))
    broken = {"plain": plain, "redirected": torch.full((3,), torch.nan)}
    assert torch.equal(AttentiveEraser.neutral().combine(broken), plain)
    assert AttentiveEraser.neutral().combine({"plain": plain.half(), "redirected": plain}).dtype is torch.float32
    names = AttentiveEraser().variants(Prompt((3, 4)))
    assert list(names) == ["plain", "redirected"]
    assert names["plain"] == (Prompt((3, 4)), Stack())
    assert names["redirected"][0] == Prompt((3, 4))


def test_a_language_model_decodes_from_both_runs() -> None:
    model, method = models.tiny("llama"), AttentiveEraser(s=1.5, u=0.5)
    ids, out = models.tiny_inputs(model, batch=1)["input_ids"], []
    roles = {"marked": ((1, 4),)}
    prompt = Prompt(tuple(ids[0].tolist()), roles=roles)
    for _ in range(3):  # from the whole text each time, without a cache
        with torch.no_grad():
            plain = model(input_ids=ids).logits[0, -1]
            with attach(model, _redirected(method), roles=roles) as run:
                redirected = run(input_ids=ids).logits[0, -1]
        out.append(int((1.5 * redirected - 0.5 * plain).argmax()))
        ids = torch.cat([ids, torch.tensor([out[-1:]])], 1)
    assert decode(model, prompt, method, new_tokens=3) == tuple(out)


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"role": ""}, r"AttentiveEraser.role = '': must name a role"),
        ({"s": float("inf")}, r"AttentiveEraser.s = inf: must be finite"),
        ({"u": 1.1}, r"AttentiveEraser.u = 1.1: must lie from 0 to 1"),
        ({"early": -0.1}, r"AttentiveEraser.early = -0.1: must lie from 0 to 1"),
        ({"layers": (0, -1)}, r"AttentiveEraser.layers"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            AttentiveEraser(**settings)
    assert AttentiveEraser(u=0.0, early=0.0, s=-1.0, layers=(0,)).u == AttentiveEraser(u=1.0, early=1.0).u - 1
