"""SelectAndPack against an encoder of the selected patches alone, and its gate against a regression's conditions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.fitted import Fitted
from heedful.core.regions import Region
from heedful.methods import SelectAndPack


def image_model() -> tuple[Any, dict[str, Tensor]]:
    model = models.tiny("vit", num_hidden_layers=3, image_size=16, attn_implementation="eager")
    return model, models.tiny_inputs(model, batch=3)


@torch.no_grad()
def behind(model: Any, layer: int, pixels: Tensor) -> Tensor:
    x = model.vit.embeddings(pixels)
    for block in model.vit.layers[: layer + 1]:
        x = block(x)
    return x


def gate(e: int, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(e, generator=draw), "mean": torch.randn(e, generator=draw),
        "deviation": 0.5 + torch.rand(e, generator=draw), "bias": torch.randn(1, generator=draw),
    }  # fmt: skip


def selected(x: Tensor, given: dict[str, Tensor], least: float) -> list[int]:
    """Of tokens `[n e]`: the class token, and those that the gate is sure of."""
    out = [0]
    for i in range(1, len(x)):
        total = float(given["bias"])
        for c in range(x.shape[1]):
            total += float((x[i, c] - given["mean"][c]) / given["deviation"][c] * given["weight"][c])
        if 1 / (1 + math.exp(-total)) >= least:
            out.append(i)
    return out


@pytest.mark.parametrize(("layer", "least"), [(0, 0.5), (1, 0.3), (1, 0.9)])
@torch.no_grad()
def test_later_layers_have_what_is_selected(layer: int, least: float) -> None:
    model, inputs = image_model()
    given = gate(model.config.hidden_size)
    seen: list[Tensor] = []
    hook = model.vit.layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with attach(model, SelectAndPack(layer, least, Fitted(given))) as run:
        found = run(**inputs).logits
        assert run.active
    hook.remove()
    kept = []
    for row, x in enumerate(behind(model, layer, inputs["pixel_values"])):
        mine = selected(x, given, least)
        kept.append(len(mine))
        left = x[mine][None]
        for block in model.vit.layers[layer + 1 :]:
            left = block(left)
        assert close_model(found[row], model.classifier(model.vit.layernorm(left)[0, 0]))
        want = x.clone()
        want[mine] = left[0]
        assert close_model(seen[0][row], want)
    assert 1 < sum(kept) < 3 * 17


def test_a_gate_that_selects_nothing_leaves_the_class_token() -> None:
    model, inputs = image_model()
    none = gate(model.config.hidden_size) | {"bias": torch.tensor([-1e6])}
    counts: list[int] = []
    hook = model.vit.layers[1].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    with torch.no_grad(), attach(model, SelectAndPack(0, 0.5, Fitted(none))) as run:
        assert bool(run(**inputs).logits.isfinite().all())
    hook.remove()
    assert counts == [1]


def test_without_a_class_token_the_first_one_stays() -> None:
    model = models.tiny("bert")
    inputs = models.tiny_inputs(model, length=5)
    none = gate(model.config.hidden_size) | {"bias": torch.tensor([-1e6])}
    counts: list[int] = []
    hook = model.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    with torch.no_grad(), attach(model, SelectAndPack(0, 0.5, Fitted(none))) as run:
        run(**inputs)
    hook.remove()
    assert counts == [1]


@pytest.mark.parametrize(("patches", "stay"), [((2, 6), {0, 1, 6, 7}), ((0, 8), {0})])
def test_what_is_no_patch_stays_and_of_patches_alone_the_first(patches: tuple[int, int], stay: set[int]) -> None:
    none = SelectAndPack(0, 0.5, Fitted(gate(4) | {"bias": torch.tensor([-1e6])}))
    call = replace(Bare(Shape(q=8, k=8), rules=()).call, roles={"patches": Region((patches,))})
    found = none.select(torch.randn(2, 8, 4), call)
    assert found.stream.shape[1] == len(stay)
    assert [{i for i in range(8) if row[i] >= 0} for row in found.to] == [stay, stay]


@torch.no_grad()
def test_a_random_gate_is_drawn_by_its_seed() -> None:
    model, inputs = image_model()
    found = []
    for seed in (0, 0, 1):
        with attach(model, SelectAndPack(0, seed=seed)) as run:
            found.append(run(**inputs).logits)
            assert run.active
    assert torch.equal(found[0], found[1])
    assert not close_model(found[0], found[2])


def test_a_patch_that_is_just_sure_enough_stays() -> None:
    call, stream = replace(Bare(Shape(q=4, k=4, e=6)).call, layer=3, roles={}), torch.ones(2, 4, 6)
    given = {**gate(6), "weight": torch.zeros(6), "bias": torch.zeros(1)}  # whose sigmoid is one half
    assert SelectAndPack(gate=Fitted(given)).select(stream, call).stream.shape == stream.shape
    assert SelectAndPack(least=0.51, gate=Fitted(given)).select(stream, call).stream.shape == (2, 1, 6)


def test_the_gate_is_a_regression() -> None:
    """At the optimum the loss has no slope: of each weight sum (p - y) z + w, of the bias sum (p - y)."""
    model, inputs = image_model()
    draw = torch.Generator().manual_seed(3)
    wanted = torch.rand(3, 16, generator=draw) < 0.4
    more = models.tiny_inputs(model, batch=2, seed=5)
    also = torch.rand(2, 16, generator=draw) < 0.6
    batches = [{**inputs, "selected": wanted}, {**more, "selected": also.long()}]
    method = fit(SelectAndPack(1), model, batches)
    assert method.gate is not None
    x = torch.cat([behind(model, 1, b["pixel_values"])[:, 1:].flatten(0, 1) for b in batches]).double()
    y = torch.cat([wanted.flatten(), also.flatten()]).double()
    mean = x.sum(0) / len(x)
    deviation = ((x - mean).square().sum(0) / len(x)).sqrt()
    assert close_model(method.gate["mean"], mean.float())
    assert close_model(method.gate["deviation"], deviation.float())
    z = (x - mean) / deviation
    weight = method.gate["weight"].double()
    miss = 1 / (1 + (-(z @ weight + method.gate["bias"].double())).exp()) - y
    assert float((z.T @ miss + weight).abs().max()) < 0.02
    assert abs(float(miss.sum())) < 0.02
    assert float(weight.abs().max()) > 0.1


def test_a_model_in_half_precision_has_its_gate_fitted_in_full() -> None:
    model, inputs = image_model()
    wanted = torch.rand(3, 16, generator=torch.Generator().manual_seed(4)) < 0.4
    pixels = inputs["pixel_values"].bfloat16()
    found = fit(SelectAndPack(1), model.bfloat16(), [{"pixel_values": pixels, "selected": wanted}]).gate
    assert found is not None
    assert {x.dtype for x in found.values()} == {torch.float32}


def test_neutral_is_idle() -> None:
    model, inputs = image_model()
    with torch.no_grad(), pytest.warns(InactiveWarning), attach(model, SelectAndPack(1, 0.0)) as run:
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)


def test_what_it_needs() -> None:
    model, inputs = image_model()
    with torch.no_grad(), pytest.raises(FieldError, match="must be fitted"), attach(model, SelectAndPack(1)) as run:
        run(**inputs)
    other = SelectAndPack(1, gate=Fitted(gate(7)))
    with torch.no_grad(), pytest.raises(FieldError, match="another model"), attach(model, other) as run:
        run(**inputs)
    with pytest.raises(FieldError, match="both labels"):
        fit(SelectAndPack(1), model, [{**inputs, "selected": torch.ones(3, 16)}])
    with pytest.raises(FieldError, match="both labels"):
        fit(SelectAndPack(1), model, [])
    with pytest.raises(FieldError, match=r'batches = .*: must have "selected" \[b patches\]'):
        fit(SelectAndPack(1), model, [inputs])
    with pytest.raises(FieldError, match="layer = 3: must be a layer of the model, whose last is 2"):
        fit(SelectAndPack(3), model, [inputs])
    with pytest.raises(FieldError, match="must say of"):
        fit(SelectAndPack(1), model, [{**inputs, "selected": torch.ones(3, 15)}])


@pytest.mark.parametrize(("field", "value"), [("layer", -1), ("least", -0.1), ("least", 1.0)])
def test_bad_fields(field: str, value: float) -> None:
    with pytest.raises(FieldError, match=field):
        SelectAndPack(**{field: value})
