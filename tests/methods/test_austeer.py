"""AUSteer: the channels that pairs of texts agree about, scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, fold, models
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.methods.intervene.language.austeer import AUSteer


def _momenta(layers: int = 2, heads: int = 4) -> Fitted:
    draw = torch.Generator().manual_seed(3)
    keep = torch.arange(8) > 0  # a fit takes some channels of a head and not others
    return Fitted({f"beta.{i}": keep * (2 * torch.rand(heads, 8, generator=draw) - 1) for i in range(layers)})


def _by_hand(model: Any, momenta: Fitted, strength: float, **inputs: Tensor) -> Tensor:
    def scaled(layer: int, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        for i, beta in enumerate(momenta[f"beta.{layer}"].flatten().tolist()):
            x[..., i] = x[..., i] + strength * beta * args[0][..., i]
        return (x,)

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, i=i: scaled(i, args))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return found


def test_channels_are_scaled() -> None:
    model, momenta = models.tiny("llama"), _momenta()
    inputs = models.tiny_inputs(model)
    wanted = _by_hand(model, momenta, -1.5, **inputs)
    with torch.no_grad(), attach(model, AUSteer(strength=-1.5, momenta=momenta)) as run:
        assert close_model(run(**inputs).logits, wanted)
    assert not close_model(wanted, model(**inputs).logits)
    assert close_model(fold(model, AUSteer(strength=-1.5, momenta=momenta))(**inputs).logits, wanted)


def _texts(model: Any) -> tuple[dict[str, Tensor], Tensor, list[int]]:
    """Six texts with padding on either side, which have the trait, and where each ends."""
    ids = models.tiny_inputs(model, batch=6, length=7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[3, 5:] = 0
    positive = torch.tensor([False, True, True, False, False, True])
    return {"input_ids": ids, "attention_mask": mask}, positive, [6, 6, 6, 4, 6, 6]


def _wanted(model: Any, inputs: dict[str, Tensor], positive: Tensor, ends: list[int], count: int) -> list[list[float]]:
    """beta of every channel, by layer, counted one pair and one channel at a time."""
    seen: list[Tensor] = []
    handles = [
        x.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for x in model.model.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    having = [i for i in range(6) if positive[i]]
    others = [i for i in range(6) if not positive[i]]
    scored = []
    for layer, x in enumerate(seen):
        for channel in range(x.shape[-1]):
            up = down = 0
            for a, b in zip(having, others, strict=True):
                move = float(x[a, ends[a], channel] - x[b, ends[b], channel])
                up, down = up + (move > 0), down + (move < 0)
            scored.append((layer, channel, up / 3 if up >= down else -down / 3))
    out = [[0.0] * x.shape[-1] for x in seen]
    for layer, channel, beta in sorted(scored, key=lambda one: -abs(one[2]))[:count]:
        out[layer][channel] = beta
    return out


@pytest.mark.parametrize("count", [5, 40, 1000])
def test_a_fit_keeps_the_channels_that_most_pairs_agree_about(count: int) -> None:
    model = models.tiny("llama")
    inputs, positive, ends = _texts(model)
    wanted = _wanted(model, inputs, positive, ends, count)
    whole = [{**inputs, "positive": positive}]
    parts = [{**{k: x[i : i + 1] for k, x in inputs.items()}, "positive": bool(positive[i])} for i in range(6)]
    for batches in (whole, parts):
        found = fit(AUSteer(count=count), model, batches).momenta
        assert found is not None
        assert set(found) == {"beta.0", "beta.1"}
        for layer, betas in enumerate(wanted):
            assert found[f"beta.{layer}"].shape == (4, 8)
            assert close(found[f"beta.{layer}"].flatten(), torch.tensor(betas))
    values = [abs(x) for row in wanted for x in row]
    assert sum(x > 0 for x in values) == min(count, 64)
    assert {round(x, 3) for x in values} == (
        {1.0, 0.0} if count == 5 else {1.0, 0.667} | ({0.0} if count == 40 else set())
    )


def test_where_pairs_are_divided_the_trait_counts_as_more() -> None:
    """The authors turn the sign only where fewer pairs rise than fall."""
    model = models.tiny("llama")
    ids = models.tiny_inputs(model, batch=2, length=7)["input_ids"]
    ids = torch.cat([ids, ids.flip(0)])  # each pair's moves are the other's, turned round
    batch = {"input_ids": ids, "positive": torch.tensor([True, False, True, False])}
    found = fit(AUSteer(count=1000), model, [batch]).momenta
    assert found is not None
    assert all(close(x, torch.full((4, 8), 0.5)) for x in found.values())


def test_a_layer_without_channels_is_idle() -> None:
    model = models.tiny("llama")
    momenta = Fitted({**_momenta(), "beta.1": torch.zeros(4, 8)})
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, AUSteer(momenta=momenta)) as run:
        run(**inputs)
        assert run.inactive == ()
    resting = AUSteer(momenta=momenta).on(layers=1)
    warned = pytest.warns(InactiveWarning, match="at HEAD_OUTPUT, which was idle")
    with torch.no_grad(), warned, attach(model, resting) as run:
        assert close_model(run(**inputs).logits, _by_hand(model, momenta, 0.0, **inputs))


def test_random_momenta_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1), (1, 0)):
        draw = torch.rand(2, 6, generator=torch.Generator().manual_seed(1_000_003 * seed + layer))
        assert close(AUSteer(strength=0.5, seed=seed)._factor(2, 6, layer), 0.5 + draw)


def test_errors() -> None:
    model = models.tiny("llama")
    inputs, positive, _ = _texts(model)
    with pytest.raises(FieldError, match=r"AUSteer.count = 0: must be 1 or more"):
        AUSteer(count=0)
    with pytest.raises(FieldError, match=r"AUSteer.strength = -inf: must be finite"):
        AUSteer(strength=-float("inf"))
    with (
        pytest.raises(FieldError, match="to texts with and without the trait, or seed"),
        attach(model, AUSteer()) as run,
    ):
        run(**inputs)
    for wrong in (_momenta(layers=1), _momenta(heads=3)):
        with (
            pytest.raises(FieldError, match="were fitted to another model"),
            attach(model, AUSteer(momenta=wrong)) as run,
        ):
            run(**inputs)
    with pytest.raises(FieldError, match="need 'positive' in each"):
        fit(AUSteer(), model, [inputs])
    for batches in ([], [{**inputs, "positive": True}]):
        with pytest.raises(FieldError, match="must hold positive and other texts"):
            fit(AUSteer(), model, batches)
    positive[0] = True
    with pytest.raises(FieldError, match="must hold a text without the trait for each one with it"):
        fit(AUSteer(), model, [{**inputs, "positive": positive}])
