"""NestedAttention: a word's value that depends on who asks, by loops, in models and in training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.methods.mechanisms.pooling.nested_attention import NestedAttention

from .painter import HEADS, WIDTH, Painter, inputs

ROLES = {"subject": ((2, 3),), "other": ((0, 1), (4, 6))}
D = WIDTH // HEADS


def _attend(layer: Any, x: Tensor, context: Tensor, keys: Tensor, values: Tensor, words: list[list[int]]) -> Tensor:
    """By loops; `words` has the subject's words of each text."""
    q, k, v = layer.heads(layer.q(x)), layer.heads(layer.k(context)), layer.heads(layer.v(context))
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(HEADS):
            for i in range(x.shape[1]):
                weights = torch.stack([(q[b, h, i] * k[b, h, j]).sum() / math.sqrt(D) for j in range(k.shape[2])])
                nested = torch.stack([(q[b, h, i] * key).sum() / math.sqrt(D) for key in keys[h]]).softmax(0)
                own = sum(w * value for w, value in zip(nested, values[h], strict=True))
                for j, weight in enumerate(weights.softmax(0)):
                    out[b, h, i] += weight * (own if j in words[b] else v[b, h, j])
    return out.transpose(1, 2).flatten(2)


def _by_hand(model: Painter, x: Tensor, context: Tensor, params: list[Any], words: list[list[int]]) -> Tensor:
    for layer, own in zip(model.layers, params, strict=True):
        x = x + _attend(layer, x, context, own["keys"], own["values"], words)
    return x


def _drawn(tokens: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(HEADS, tokens, D, generator=draw, dtype=torch.float64) for name in ("keys", "values")}
        for _ in range(2)
    ]


def _set(run: Any, params: list[dict[str, Tensor]]) -> None:
    given = [own[name] for own in params for name in ("keys", "values")]
    with torch.no_grad():
        for mine, x in zip(run.parameters(), given, strict=True):
            mine.copy_(x)


@pytest.mark.parametrize(
    ("tokens", "role", "words"), [(3, "subject", [2]), (1, "subject", [2]), (2, "other", [0, 4, 5])]
)
def test_the_words_value_is_the_subjects_tokens_as_the_place_looks_at_them(
    tokens: int, role: str, words: list[int]
) -> None:
    model, given, params = Painter(), inputs(), _drawn(tokens)
    with attach(model, NestedAttention(tokens, role), roles=ROLES, inputs=given) as run:
        _set(run, params)
        found = run(**given)
    assert close(found.float(), _by_hand(model, **given, params=params, words=[words] * 2).float())


def test_each_text_has_a_word_of_its_own_and_one_without_is_as_it_was() -> None:
    model, given, params = Painter(), inputs(3), _drawn(2)
    roles: list[dict[str, Any]] = [{"subject": ((1, 2),)}, {"subject": ((5, 6),)}, {"subject": ()}]
    with attach(model, NestedAttention(2), roles=roles, inputs=given) as run:
        _set(run, params)
        found = run(**given)
    assert close(found.float(), _by_hand(model, **given, params=params, words=[[1], [5], []]).float())
    assert close(found[2].float(), model(**given)[2].float())


def test_what_is_learnt_is_given_what_it_brought() -> None:
    model, given, params = Painter(), inputs(), _drawn(3)
    for own in params:
        for x in own.values():
            x.requires_grad_()
    loss = _by_hand(model, **given, params=params, words=[[2]] * 2).square().sum()
    slopes = torch.autograd.grad(loss, [own[name] for own in params for name in ("keys", "values")])
    with attach(model, NestedAttention(3), roles=ROLES, inputs=given) as run:
        _set(run, params)
        found = torch.autograd.grad(run(**given).square().sum(), list(run.parameters()))
    for mine, slope in zip(found, slopes, strict=True):
        assert close_model(mine.float(), slope.float())


def test_heads_that_share_keys_share_the_subjects_tokens() -> None:
    bare = Bare(Shape(q=4, k=6, dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, cross=True, roles={"subject": ((1, 2),)}, softcap=None)
    draw = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(2, 3, d, generator=draw, dtype=torch.float64) for d in (8, 6))
    heads, _ = bare.run(NestedAttention(3), "reference", params={"keys": keys, "values": values})
    for b in range(2):
        for h in range(4):
            g = h // 2
            weights = (bare.q[b, h] @ bare.k[b, g].T / 8**0.5).softmax(-1)
            own = (bare.q[b, h] @ keys[g].T / 8**0.5).softmax(-1) @ values[g]
            rest = [j for j in range(6) if j != 1]
            assert close(heads[b, h], weights[:, rest] @ bare.v[b, g, rest] + weights[:, 1:2] * own)


def test_what_it_starts_with() -> None:
    layer = Layer(3, 4, 2, 8, 6, 32)
    found = NestedAttention(5, spread=0.5).parameters(layer)
    draw = torch.Generator().manual_seed(3)
    assert torch.equal(found["keys"], 0.5 * torch.randn(2, 5, 8, generator=draw))
    assert torch.equal(found["values"], 0.5 * torch.randn(2, 5, 6, generator=draw))


def test_self_attention_is_left_alone() -> None:
    model = models.tiny("llama")
    given = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, NestedAttention(2)) as run:
        assert torch.equal(run(**given).logits, model(**given).logits)
        run.state.changed.update(run.stack.steps())  # it changes nothing, as it should


def test_errors() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tokens": 0}, "NestedAttention.tokens = 0: must be 1 or more"),
        ({"role": ""}, "NestedAttention.role = '': must name a role"),
        ({"spread": 0.0}, "NestedAttention.spread = 0.0: must be above 0"),
        ({"spread": math.inf}, "NestedAttention.spread = inf: must be above 0"),
    )
    for settings, match in cases:
        with pytest.raises(FieldError, match=match):
            NestedAttention(**settings)
    assert NestedAttention(1).tokens == 1
