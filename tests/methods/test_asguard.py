"""ASGuard: which heads are found, how their scales learn, and what they do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, fold, models
from heedful.authoring import Fitted
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.asguard import ASGuard
from tests.by_hand import Steps, Turn, causal_map, ending_in, heads_of, llama_states


def _scales(layers: tuple[int, ...] = (1,)) -> Fitted:
    draw = torch.Generator().manual_seed(1)
    return Fitted({f"s.{i}": 2 * torch.rand(4, 8, generator=draw) for i in layers})


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_channels_are_scaled(layers: tuple[int, ...]) -> None:
    model, scales = models.tiny("llama"), _scales(layers)
    inputs = models.tiny_inputs(model)
    handles = [
        model.model.layers[i].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, s=scales[f"s.{i}"]: (args[0] * s.flatten(),)
        )
        for i in layers
    ]
    with torch.no_grad():
        wanted = model(**inputs).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), attach(model, ASGuard(scales=scales)) as run:
        assert close_model(run(**inputs).logits, wanted)
    assert not close_model(wanted, model(**inputs).logits)
    assert close_model(fold(model, ASGuard(scales=scales))(**inputs).logits, wanted)


def _loss(model: Any, batch: dict[str, Tensor], scales: list[Tensor]) -> Tensor:
    """Minus the log-probability of the last token, of heads that are scaled, `[h d]` a layer."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        return heads_of(causal_map(turn(q), turn(k)), v) * scales[layer][:, None]

    logits = model.lm_head(llama_states(model, batch["input_ids"], attend))
    return sum(-logits[b, -2].log_softmax(-1)[7] for b in range(4)) / 4


@pytest.mark.parametrize("count", [1, 3])
def test_heads_are_those_without_which_the_loss_falls_most(count: int) -> None:
    model, batches = models.tiny("llama"), ending_in(models.tiny("llama"))
    ones = [torch.ones(4, 8, requires_grad=True) for _ in range(2)]
    grads = torch.autograd.grad(sum(_loss(model, batch, ones) for batch in batches), ones)
    falls = {(layer, head): float(grads[layer][head].sum()) for layer in range(2) for head in range(4)}
    wanted = sorted(falls, key=lambda one: -falls[one])[:count]
    assert fit(ASGuard(count=count, epochs=1), model, batches).heads == tuple(sorted(wanted))
    assert len(fit(ASGuard(count=50, epochs=1), model, batches).heads) == 8


def test_scales_go_down_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    batches, heads = ending_in(model), ((0, 1), (1, 3), (1, 0))
    found = fit(ASGuard(heads=heads, epochs=2, rate=0.05), model, batches)
    assert kept.settings == [{"lr": 0.05}]
    assert kept.rates == [0.05] * 4
    for step in range(4):
        scales = [x.clone() for x in kept.before[step]]
        if step == 0:
            assert all(bool((x == 1).all()) for x in scales)
        for layer, head in ((n, h) for n in range(2) for h in range(4)):
            if (layer, head) not in heads:
                scales[layer][head] = 1.0
        scales = [x.requires_grad_() for x in scales]
        grads = torch.autograd.grad(_loss(model, batches[step % 2], scales), scales)
        for layer, head in heads:
            assert close_model(kept.grads[step][layer][head], grads[layer][head])
        for layer, head in ((0, 0), (0, 2), (1, 1)):
            assert not kept.grads[step][layer][head].any()
    assert found.heads == heads
    assert found.scales is not None
    for layer in range(2):
        moved = (found.scales[f"s.{layer}"] != 1).any(-1).tolist()
        assert moved == [(layer, head) in heads for head in range(4)]
    with torch.no_grad():
        before, after = ([torch.ones(4, 8)] * 2, [found.scales["s.0"], found.scales["s.1"]])
        assert sum(_loss(model, b, after) for b in batches) < sum(_loss(model, b, before) for b in batches)


def test_a_fit_touches_the_layers_of_its_heads_and_leaves_the_model() -> None:
    model = models.tiny("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = fit(ASGuard(heads=((1, 2),)), model, ending_in(model))
    assert list(found.scales or ()) == ["s.1"]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_random_scales_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1), (1, 0)):
        wanted = torch.rand(2, 6, generator=torch.Generator().manual_seed(4099 * seed + layer))
        found = ASGuard(seed=seed)._scale(2, 6, layer)
        assert found is not None
        assert close(found / 2, wanted)


@pytest.mark.parametrize(
    ("method", "layer", "idle"),
    [
        (ASGuard(scales=Fitted({})), 1, True),
        (ASGuard(seed=0), 1, False),
        (ASGuard(scales=_scales((1,))), 1, False),
        (ASGuard(scales=_scales((1,))), 0, True),
    ],
)
def test_it_is_idle_where_nothing_is_scaled(method: ASGuard, layer: int, idle: bool) -> None:
    assert method.idle(replace(Bare().call, layer=layer, depth=2)) == idle


def test_errors() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    for settings, match in (
        ({"count": 0}, r"ASGuard.count = 0"),
        ({"epochs": 0}, r"ASGuard.epochs = 0"),
        ({"rate": 0.0}, r"ASGuard.rate = 0.0"),
        ({"rate": float("inf")}, r"ASGuard.rate = inf"),
        ({"heads": ((0, -1),)}, r"ASGuard.heads"),
    ):
        with pytest.raises(FieldError, match=match):
            ASGuard(**settings)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="to attacks with labels, or seed be given"), attach(model, ASGuard()) as run:
        run(**inputs)
    for wrong in (Fitted({"s.2": torch.ones(4, 8)}), Fitted({"s.0": torch.ones(4, 9)})):
        with pytest.raises(FieldError, match="fitted to another model"), attach(model, ASGuard(scales=wrong)) as run:
            run(**inputs)
    for batches in ([], [inputs]):
        with pytest.raises(FieldError, match="must be 1 or more, each with labels"):
            fit(ASGuard(), model, batches)
    for heads in (((0, 4),), ((0, 0), (2, 0))):
        rule = r"ASGuard\.heads = .*: must be below 2 layers and their 4 heads; for example heads=\(\(0, 0\),\)"
        with pytest.raises(FieldError, match=rule):
            fit(ASGuard(heads=heads), model, ending_in(model))


def test_a_model_in_bfloat16_learns_in_small_steps() -> None:
    """Steps of 0.001 at 1 are smaller than what bfloat16 can tell apart there, so they are counted in float32."""
    model = models.tiny("llama", dtype=torch.bfloat16)
    found = fit(ASGuard(heads=((0, 1),)), model, ending_in(model)).scales
    assert found is not None
    assert close(found["s.0"][[0, 2, 3]], torch.ones(3, 8))
    moved = (found["s.0"][1] - 1).abs()
    assert float(moved.max()) > 0.0025
    assert float(moved.max()) < 0.0065
