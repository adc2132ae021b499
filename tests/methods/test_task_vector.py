"""LearnableTaskVector: weighted heads of prompts with examples, on top of the last token's stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.task_vector import LearnableTaskVector, _Weights


def _vectors(layers: int = 2, width: int = 32) -> Fitted:
    draw = torch.Generator().manual_seed(3)
    return Fitted({f"v.{i}": torch.randn(width, generator=draw) for i in range(layers)})


def _by_hand(model: Any, vectors: Fitted, strength: float, **inputs: Tensor) -> Tensor:
    """The same edit with plain hooks on the layers, for texts without padding."""
    handles = []
    for i, layer in enumerate(model.model.layers):

        def add(_: Any, args: Any, out: Tensor, i: int = i) -> Tensor:
            out = out.clone()
            out[:, -1] += strength * vectors[f"v.{i}"]
            return out

        handles.append(layer.register_forward_hook(add))
    with torch.no_grad():
        found = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return found


def test_the_formula_and_padding() -> None:
    model, vectors = models.tiny("llama"), _vectors()
    ids = models.tiny_inputs(model, batch=1)["input_ids"]
    pad = torch.zeros(1, 5, dtype=torch.long)
    wanted = _by_hand(model, vectors, 0.5, input_ids=ids)
    assert not close_model(_by_hand(model, vectors, 1.0, input_ids=ids), wanted)
    with torch.no_grad(), attach(model, LearnableTaskVector(vectors, strength=0.5)) as run:
        assert close_model(run(input_ids=ids).logits, wanted)
        for parts in ((pad, ids), (ids, pad)):
            whole = torch.cat(parts, 1)
            found = run(input_ids=whole, attention_mask=(whole > 0).long()).logits
            assert close_model(found[whole > 0][None], wanted)


def test_decoding_is_left_alone() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        with attach(model, LearnableTaskVector(_vectors())) as run:
            first = run(input_ids=ids[:, :-1], use_cache=True)
            caches = [(x.keys.clone(), x.values.clone()) for x in first[CACHE].layers]
            found = run(input_ids=ids[:, -1:], **{CACHE: first[CACHE]}).logits
        for layer, (keys, values) in zip(first[CACHE].layers, caches, strict=True):
            layer.keys, layer.values = keys, values
        assert close_model(found, model(input_ids=ids[:, -1:], **{CACHE: first[CACHE]}).logits)


def _batches(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    bare = {**models.tiny_inputs(model, batch=4, length=6, seed=1), "target": torch.tensor([7, 7, 7, 7])}
    return models.tiny_inputs(model, batch=3, length=18), bare


def test_a_fit_learns_weights_of_what_heads_write() -> None:
    model = models.tiny("llama")
    shots, bare = _batches(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    settings = LearnableTaskVector(steps=15, rate=0.2, start=0.0)
    method = fit(settings, model, [shots, bare])
    assert method == fit(settings, model, [shots, bare])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    seen: list[Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1].mean(0)))
        for layer in model.model.layers
    ]
    asked = {name: x for name, x in bare.items() if name != "target"}
    with torch.no_grad():
        model(**shots)
        for handle in handles:
            handle.remove()
        for i, mean in enumerate(seen):
            o = model.model.layers[i].self_attn.o_proj.weight
            each = torch.stack([o[:, 8 * h : 8 * h + 8] @ mean[8 * h : 8 * h + 8] for h in range(4)])
            assert close_model(method.vectors[f"v.{i}"], method.vectors[f"w.{i}"] @ each)
            assert bool(method.vectors[f"w.{i}"].all())
        native = model(**asked).logits[:, -1]
        with attach(model, method) as run:
            found = run(**asked).logits[:, -1]
    cross = torch.nn.functional.cross_entropy
    assert float(cross(found, bare["target"])) < float(cross(native, bare["target"]))


def test_a_fit_starts_from_random_weights() -> None:
    model = models.tiny("llama")
    fits = [
        fit(LearnableTaskVector(steps=1, rate=1e-9, start=start, seed=seed), model, _batches(model)).vectors
        for start, seed in ((1.0, None), (1.0, 0), (2.0, 0), (1.0, 5))
    ]
    assert close(fits[0]["w.0"], fits[1]["w.0"])
    assert close(fits[2]["w.1"], 2 * fits[1]["w.1"])
    assert not close(fits[3]["w.0"], fits[1]["w.0"])


def test_errors() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    for settings, match in (
        ({"steps": 0}, r"LearnableTaskVector\.steps = 0"),
        ({"rate": 0.0}, r"LearnableTaskVector\.rate"),
        ({"start": -1.0}, r"LearnableTaskVector\.start"),
        ({"strength": float("inf")}, r"LearnableTaskVector\.strength"),
    ):
        with pytest.raises(FieldError, match=match):
            LearnableTaskVector(**settings)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="must be fitted"), attach(model, LearnableTaskVector()) as run:
        run(**inputs)
    for wrong in (_vectors(layers=1), _vectors(width=31)):
        with pytest.raises(FieldError, match="another model"), attach(model, LearnableTaskVector(wrong)) as run:
            run(**inputs)
    with pytest.raises(FieldError, match='some without "target", some with'):
        fit(LearnableTaskVector(), model, [inputs])


def test_weights_start_at_a_spread_drawn_by_the_seed() -> None:
    for number in (0, 1):
        found = _Weights(_vectors(), 0.3, 5).parameters(Layer(number, 4, 2, 8, 8, 32))["w"]
        assert close(found, 0.3 * torch.randn(4, generator=torch.Generator().manual_seed(4099 * 5 + number)))
    model = models.tiny("llama")
    unsaid = fit(LearnableTaskVector(steps=1, rate=1e-9), model, _batches(model)).vectors
    assert unsaid is not None
    assert close_model(unsaid["w.1"], torch.randn(4, generator=torch.Generator().manual_seed(1)))


def test_random_vectors_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1)):
        wanted = torch.randn(6, generator=torch.Generator().manual_seed(4099 * seed + layer))
        assert torch.equal(LearnableTaskVector(seed=seed)._vector(6, layer), wanted)
