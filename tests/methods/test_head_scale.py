"""HeadScale: each head's scores by a factor of its own, and how the factors are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heedful import attach, fit, models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.core.kinds import HeadWeights
from heedful.core.method import Layer
from heedful.methods.intervene.head_scale import HeadScale, _loss
from heedful.methods.intervene.temp_scale import TempScale


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
