"""HeadScale: each head's scores by a factor of its own, and how the factors are found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.kinds.weights import HeadWeights
from heedful.methods.intervene.language import head_scale
from heedful.methods.intervene.language.head_scale import HeadScale, _loss, _schedule
from heedful.methods.intervene.language.temp_scale import TempScale
from tests.by_hand import Steps, Turn, causal_map, heads_of, llama_states


def _scales(model: Any, seed: int = 0) -> Fitted:
    config, draw = model.config, torch.Generator().manual_seed(seed)
    heads = config.num_attention_heads
    return Fitted({f"s.{n}": 1 + torch.rand(heads, generator=draw) for n in range(config.num_hidden_layers)})


def test_a_uniform_scale_is_a_temperature() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        with attach(model, HeadScale(1.7)) as run:
            found = run(**inputs).logits
        with attach(model, TempScale(1 / 1.7)) as run:
            wanted = run(**inputs).logits
        native = model(**inputs).logits
    assert close_model(found, wanted)
    assert not close_model(found, native)


def test_each_head_has_its_own() -> None:
    model = models.tiny("llama")
    inputs, scales = models.tiny_inputs(model), _scales(model)
    with torch.no_grad():
        with attach(model, HeadScale(scales=scales)) as run:
            found = run(**inputs).logits
        stack: Any = None
        for name, row in scales.items():
            for head, factor in enumerate(row.tolist()):
                part = HeadScale(factor).on(int(name[2:]), head)
                stack = part if stack is None else stack | part
        with attach(model, stack) as run:
            wanted = run(**inputs).logits
    assert close_model(found, wanted)


def test_weights_hold_the_factors() -> None:
    model = models.tiny("llama")
    scales = _scales(model)
    draw = torch.Generator().manual_seed(1)
    h = model.config.num_attention_heads
    q, bias, other = (torch.randn(*size, generator=draw) for size in ((h, 4, 6), (h, 4), (2, 4, 6)))
    weights = HeadWeights(q, other, other, torch.randn(6, h, 4, generator=draw), bias)
    layer = Layer(1, h, 2, 4, 4, 6)
    found = HeadScale(scales=scales).folds(weights, layer)
    for i, factor in enumerate(scales["s.1"].tolist()):
        assert close(found.q[i], q[i] * factor)
        assert close(found.q_bias[i], bias[i] * factor)
    assert found.k is weights.k
    assert close(HeadScale(2).folds(weights, layer).q, 2 * q)
    assert HeadScale.neutral().folds(weights, layer) is weights


def test_a_fit_lowers_the_loss_and_keeps_the_bound() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    inputs = models.tiny_inputs(model, batch=2, length=40)
    before = {name: p.clone() for name, p in model.named_parameters()}
    free = fit(HeadScale(scale=1.0, steps=12, least=0.0), model, [inputs])
    bound = fit(HeadScale(scale=1.0, steps=12), model, [inputs])
    assert all(bool((s >= 1).all()) for s in bound.scales.values())
    assert any(bool((s < 1).any()) for s in free.scales.values())
    with torch.no_grad():
        losses = [float(_loss(model, inputs))]
        for part in (bound, free):
            with attach(model, part) as run:
                losses.append(float(_loss(run, inputs)))
    assert losses[2] < losses[0]
    assert losses[1] <= losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(FieldError, match=r"HeadScale\.batches"):
        fit(HeadScale(), model, [])


def test_the_first_step_goes_down_the_loss_from_the_start_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    ids = models.tiny_inputs(model, length=10)["input_ids"]
    factors = [torch.full((4,), 1.7, requires_grad=True) for _ in range(2)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        return heads_of(causal_map(turn(q) * factors[layer][:, None, None], turn(k)), v)

    logits = model.lm_head(llama_states(model, ids, attend))
    rows = [(b, i) for b in range(2) for i in range(9)]
    loss = sum(-logits[b, i].log_softmax(-1)[ids[b, i + 1]] for b, i in rows) / len(rows)
    wanted = torch.autograd.grad(loss, factors)
    fit(HeadScale(scale=1.7, steps=1), model, [{"input_ids": ids}])
    assert kept.settings == [{"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.0}]
    for found, want in zip(kept.grads[0], wanted, strict=True):
        assert close_model(found / want.abs().max(), want / want.abs().max())


def test_gradients_are_clipped_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    monkeypatch.setattr(head_scale, "_loss", lambda run, batch: sum(30 * p.sum() for p in run.parameters()))
    fit(HeadScale(steps=1), model, [{}])
    assert close_model(torch.cat(kept.grads[0]), torch.full((8,), 8**-0.5))


def test_the_rate_warms_up_and_ends_at_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    seen: list[Any] = []
    monkeypatch.setattr(
        head_scale, "_loss", lambda run, batch: seen.append(batch) or sum(p.sum() for p in run.parameters())
    )
    fit(HeadScale(steps=20, rate=0.4), model, [{"a": 0}, {"b": 1}, {"c": 2}])
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 18)) / 2 for i in range(18)]
    assert kept.rates == pytest.approx([0.4 * x for x in (0.5, 1.0, *fall)])
    assert [next(iter(batch)) for batch in seen] == [*"abc" * 6, "a", "b"]
    assert _schedule(20, 20, 2) == pytest.approx(0.1)
    kept.rates.clear()
    fit(HeadScale(steps=3, rate=0.4), model, [{}])
    assert kept.rates == pytest.approx([0.4, 0.4, 0.4 * (0.1 + 0.9 / 2)])


def test_padding_counts_for_nothing_in_a_fit() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    ids = models.tiny_inputs(model, batch=1, length=20)["input_ids"]
    pad = torch.zeros(1, 5, dtype=torch.long)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, torch.ones_like(ids)], 1)}
    method = HeadScale(steps=4)
    alone, beside = (fit(method, model, [batch]).scales for batch in ({"input_ids": ids}, padded))
    for name, row in alone.items():
        assert close_model(beside[name], row)


def test_labels_say_what_counts() -> None:
    model = models.tiny("llama", num_hidden_layers=2)
    ids = models.tiny_inputs(model, batch=2, length=12)["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, 5] = ids[0, 5]
    with torch.no_grad():
        wanted = -model(input_ids=ids).logits[0, 4].log_softmax(-1)[ids[0, 5]]
        assert close_model(_loss(model, {"input_ids": ids, "labels": labels}), wanted)


def test_scales_of_another_model_are_refused() -> None:
    model, method = models.tiny("llama", num_hidden_layers=3), HeadScale(scales=Fitted({"s.0": torch.ones(4)}))
    run = attach(model, method)
    with torch.no_grad(), pytest.raises(FieldError, match="fitted to another model"):
        run(**models.tiny_inputs(model))
    run.close()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scale": 0.0}, r"HeadScale\.scale = 0\.0: must be above 0"),
        ({"steps": 0}, r"HeadScale\.steps"),
        ({"rate": 0.0}, r"HeadScale\.rate"),
        ({"least": -1.0}, r"HeadScale\.least"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        HeadScale(**settings)


def test_a_layer_with_one_factor_of_one_is_folded_too() -> None:
    weights = HeadWeights(*(torch.ones(4, 8, 32) for _ in range(3)), torch.ones(32, 4, 8))
    scales = Fitted({"s.0": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    found = HeadScale(scales=scales).folds(weights, Layer(0, 4, 4, 8, 8, 32))
    assert [float(x[0, 0]) for x in found.q] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("left", [True, False])
def test_the_loss_is_of_the_texts_own_tokens(left: bool) -> None:
    model = models.tiny("llama")
    ids, pad = models.tiny_inputs(model, batch=1, length=9)["input_ids"], torch.zeros(1, 4, dtype=torch.long)
    parts, marks = [ids, pad], [torch.ones_like(ids), pad]
    if left:
        parts, marks = parts[::-1], marks[::-1]
    padded = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(marks, 1)}
    with torch.no_grad():
        said = model(input_ids=ids).logits[0].log_softmax(-1)
        wanted = -sum(said[i, ids[0, i + 1]] for i in range(8)) / 8
        assert close_model(_loss(model, {"input_ids": ids}), wanted)
        assert close_model(_loss(model, padded), wanted)
