"""LoFiT: offsets on chosen heads, learned, and folded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, fold, models
from heedful.authoring import Fitted
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, FoldError
from heedful.methods.intervene.language.lofit import LoFiT
from tests.by_hand import Steps, Turn, causal_map, ending_in, heads_of, llama_states


def _offsets(layers: tuple[int, ...] = (1,)) -> Fitted:
    draw = torch.Generator().manual_seed(1)
    return Fitted({f"v.{i}": torch.randn(4, 8, generator=draw) for i in layers})


def _by_hand(model: Any, offsets: Fitted, strength: float, **inputs: Tensor) -> Tensor:
    handles = [
        model.model.layers[int(name[2:])].self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, v=v: (args[0] + strength * v.flatten(),)
        )
        for name, v in offsets.items()
    ]
    with torch.no_grad():
        found = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_the_formula(layers: tuple[int, ...]) -> None:
    model, offsets = models.tiny("llama"), _offsets(layers)
    inputs = models.tiny_inputs(model)
    wanted = _by_hand(model, offsets, 0.5, **inputs)
    with torch.no_grad(), attach(model, LoFiT(offsets=offsets, strength=0.5)) as run:
        assert close_model(run(**inputs).logits, wanted)
    assert not close_model(_by_hand(model, offsets, 1.0, **inputs), wanted)


def _loss(model: Any, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches)


def test_a_fit_chooses_heads_and_learns() -> None:
    model = models.tiny("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    batches = ending_in(model)
    method = fit(LoFiT(share=0.25, epochs=8, rate=0.3), model, batches)
    assert method == fit(LoFiT(share=0.25, epochs=8, rate=0.3), model, batches)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert len(method.heads) == 2  # a quarter of two layers' four
    touched = {(int(n[2:]), h) for n, v in method.offsets.items() for h in range(4) if bool(v[h].any())}
    assert touched == set(method.heads)
    native = _loss(model, batches)
    with attach(model, method) as run:
        assert _loss(run, batches) < 0.9 * native


def test_the_heads_that_matter_are_chosen() -> None:
    model = models.tiny("llama")
    with torch.no_grad():  # only head 2 of layer 0 and head 1 of layer 1 write anything
        for layer, head in ((0, 2), (1, 1)):
            o = model.model.layers[layer].self_attn.o_proj.weight
            keep = torch.zeros_like(o)
            keep[:, 8 * head : 8 * head + 8] = 1
            o.mul_(keep)
    found = fit(LoFiT(share=0.25, epochs=4, select_rate=0.05), model, ending_in(model))
    assert set(found.heads) == {(0, 2), (1, 1)}


@pytest.mark.parametrize(("sharpness", "over"), [(0.2, False), (4.0, True)])
def test_steps_go_down_the_loss_with_gradients_clipped(
    sharpness: float, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    batches, penalty = ending_in(model), 0.01
    fit(LoFiT(share=0.25, epochs=1, rate=0.3, select_rate=0.2, penalty=penalty), model, batches)
    assert [s["lr"] for s in kept.settings] == [0.2, 0.3]
    assert [s["weight_decay"] for s in kept.settings] == [0.0, 0.0]
    assert kept.rates == pytest.approx([0.2, 0.1, 0.3, 0.15])
    norms = []
    for step in (0, 1):
        scales = [x.clone().requires_grad_() for x in kept.before[step]]
        loss = _loss_by_hand(model, batches[step], lambda layer, x, a=scales: x * (1 + a[layer][:, None]))
        grads = torch.autograd.grad(loss + penalty * sum(x.abs().sum() for x in scales), scales)
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        for found, want in zip(kept.grads[step], grads, strict=True):
            assert close_model(found, want / max(1.0, norms[-1]))
    assert (max(norms) > 1) == over


def test_offsets_go_down_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = models.tiny("llama"), Steps(monkeypatch)
    batches = ending_in(model)
    fit(LoFiT(heads=((0, 1), (1, 3)), epochs=1, penalty=9.0), model, batches)
    offsets = [x.clone().requires_grad_() for x in kept.before[0]]
    assert [x.any(-1).tolist() for x in offsets] == [[False, True, False, False], [False, False, False, True]]
    assert all(5e-4 < float(x[x != 0].std()) < 2e-3 for x in kept.before[0])  # the authors' spread of 1e-3
    loss = _loss_by_hand(model, batches[0], lambda layer, x: x + offsets[layer][:, None])
    grads = torch.autograd.grad(loss, offsets)
    for layer, head in ((0, 1), (1, 3)):
        assert close_model(kept.grads[0][layer][head], grads[layer][head])
        assert torch.equal(kept.grads[0][layer].any(-1), torch.arange(4) == head)


def _loss_by_hand(model: Any, batch: dict[str, Tensor], edit: Any) -> Tensor:
    """Minus the log-probability of the last token, of heads as `edit(layer, heads)` leaves them."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        return edit(layer, heads_of(causal_map(turn(q), turn(k)), v))

    logits = model.lm_head(llama_states(model, batch["input_ids"], attend))
    return sum(-logits[b, -2].log_softmax(-1)[7] for b in range(4)) / 4


def test_heads_can_be_named() -> None:
    model = models.tiny("llama")
    method = fit(LoFiT(heads=((1, 3), (1, 0)), epochs=2), model, ending_in(model))
    assert method.heads == ((1, 3), (1, 0))
    assert list(method.offsets) == ["v.1"]
    assert [bool(v.any()) for v in method.offsets["v.1"]] == [True, False, False, True]
    with pytest.raises(FieldError, match=r"LoFiT.heads = \(0, 4\): a head must be below 4"):
        fit(LoFiT(heads=((0, 4),)), model, ending_in(model))


@pytest.mark.parametrize("has", [True, False])
def test_it_folds_where_there_is_a_bias_or_can_be(has: bool) -> None:
    model = models.tiny("llama", attention_bias=has)
    inputs = models.tiny_inputs(model)
    method = LoFiT(offsets=_offsets())
    with torch.no_grad():
        assert close_model(fold(model, method)(**inputs).logits, _by_hand(model, method.offsets, 1.0, **inputs))
    with pytest.raises(FoldError, match=r"o_proj, a Linear, has no bias, .* its config has no switch for one"):
        fold(models.tiny("mistral"), method)


def test_errors() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    for settings, match in (
        ({"share": 0.0}, r"LoFiT.share = 0.0: must be above 0"),
        ({"epochs": 0}, r"LoFiT.epochs = 0"),
        ({"rate": 0.0}, r"LoFiT.rate = 0.0"),
        ({"select_rate": -1.0}, r"LoFiT.select_rate"),
        ({"penalty": -1.0}, r"LoFiT.penalty"),
        ({"strength": float("nan")}, r"LoFiT.strength = nan"),
        ({"heads": ((0, -1),)}, r"LoFiT.heads"),
    ):
        with pytest.raises(FieldError, match=match):
            LoFiT(**settings)  # type: ignore[arg-type]
    with (
        pytest.raises(FieldError, match="to batches with labels, or seed be given"),
        attach(model, LoFiT()) as run,
    ):
        run(**inputs)
    beyond = LoFiT(offsets=Fitted({"v.2": torch.zeros(4, 8)}))
    with pytest.raises(FieldError, match=r"LoFiT.offsets.*fitted to another model"), attach(model, beyond) as run:
        run(**inputs)
    wrong = LoFiT(offsets=Fitted({"v.0": torch.zeros(4, 9)}))
    with pytest.raises(FieldError, match="were fitted to another model"), attach(model, wrong) as run:
        run(**inputs)
    for batches in ([], [inputs]):
        with pytest.raises(FieldError, match="must be 1 or more, each with labels"):
            fit(LoFiT(), model, batches)


@pytest.mark.parametrize(
    ("method", "layer", "idle"),
    [
        (LoFiT(strength=0.0), 1, True),
        (LoFiT(strength=1.0, seed=0), 1, False),
        (LoFiT(offsets=_offsets((1,))), 1, False),
        (LoFiT(offsets=_offsets((1,))), 0, True),
    ],
)
def test_it_is_idle_where_nothing_is_added(method: LoFiT, layer: int, idle: bool) -> None:
    assert method.idle(replace(Bare().call, layer=layer, depth=2)) == idle
