"""SteeringVector: a difference of means on top of the residual stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, fold, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, FoldError
from heedful.methods.intervene.language.steering_vector import SteeringVector


def _vectors(layers: int = 2, width: int = 32) -> Fitted:
    draw = torch.Generator().manual_seed(3)
    return Fitted({f"v.{i}": torch.randn(width, generator=draw) for i in range(layers)})


def _by_hand(model: Any, vectors: Fitted, strength: float, layers: tuple[int, ...], **inputs: Tensor) -> Tensor:
    handles = [
        model.model.layers[i].register_forward_hook(lambda _, args, out, i=i: out + strength * vectors[f"v.{i}"])
        for i in layers
    ]
    with torch.no_grad():
        found = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_the_vector_is_added_after_the_layer(layers: tuple[int, ...]) -> None:
    model, vectors = models.tiny("llama"), _vectors()
    inputs = models.tiny_inputs(model)
    wanted = _by_hand(model, vectors, -1.5, layers, **inputs)
    with torch.no_grad(), attach(model, SteeringVector(-1.5, vectors).on(layers=layers)) as run:
        assert close_model(run(**inputs).logits, wanted)
        assert not close_model(wanted, model(**inputs).logits.neg())


def _texts(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, a mask with padding on either side, and the place of each text's last token."""
    ids = models.tiny_inputs(model, batch=4, length=7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[3, 5:] = 0
    return ids, mask, torch.tensor([6, 6, 6, 4])


def test_a_fit_takes_the_difference_of_last_tokens() -> None:
    model = models.tiny("llama")
    ids, mask, last = _texts(model)
    positive = torch.tensor([True, False, False, True])
    seen: list[Tensor] = []
    handles = [x.register_forward_hook(lambda _, args, out: seen.append(out.double())) for x in model.model.layers]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    fitted = fit(SteeringVector(), model, [{"input_ids": ids, "attention_mask": mask, "positive": positive}])
    for i, stream in enumerate(seen):
        ends = stream[torch.arange(4), last]
        assert close(fitted.vectors[f"v.{i}"].float(), (ends[positive].mean(0) - ends[~positive].mean(0)).float())
    rows = [
        {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1], "positive": bool(positive[i])}
        for i in range(4)
    ]
    for name, x in fit(SteeringVector(), model, rows).vectors.items():
        assert close_model(x.float(), fitted.vectors[name].float())


def test_generated_tokens_alone() -> None:
    model, vectors = models.tiny("llama"), _vectors()
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad(), attach(model, SteeringVector(2.0, vectors).when("decode")) as run:
        first = run(input_ids=ids[:, :-1], use_cache=True)
        second = run(input_ids=ids[:, -1:], **{CACHE: first[CACHE]}).logits
    with torch.no_grad():
        assert close_model(first.logits, model(input_ids=ids[:, :-1]).logits)
        assert not close_model(second[:, -1], model(input_ids=ids).logits[:, -1])


def test_errors() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with pytest.raises(FieldError, match=r"SteeringVector.strength = inf: must be finite"):
        SteeringVector(float("inf"))
    with pytest.raises(FieldError, match="to texts with and without the trait"), attach(model, SteeringVector()) as run:
        run(**inputs)
    for wrong in (_vectors(layers=1), _vectors(width=31)):
        with pytest.raises(FieldError, match="fit to this model"), attach(model, SteeringVector(1.0, wrong)) as run:
            run(**inputs)
    with pytest.raises(FieldError, match="need 'positive' in each"):
        fit(SteeringVector(), model, [inputs])
    for batches in ([], [{**inputs, "positive": True}]):
        with pytest.raises(FieldError, match="must hold positive and other texts"):
            fit(SteeringVector(), model, batches)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # in one the biases are made, in the other they are there
def test_it_folds_into_the_bias_of_the_last_map(kind: str, tmp_path: Any) -> None:
    model, method = models.tiny(kind), SteeringVector(-1.5, _vectors())
    inputs = models.tiny_inputs(model)
    plain = fold(model, method.on(layers=1))
    folder = tmp_path / "folded"
    plain.save_pretrained(folder)
    again = type(plain).from_pretrained(folder).eval()
    block = "transformer.h" if kind == "gpt2" else "model.layers"
    added = {
        n: p for n, p in again.named_parameters() if not torch.equal(p, dict(model.named_parameters()).get(n, p * 0))
    }
    assert list(added) == [f"{block}.1.mlp.{'c_proj' if kind == 'gpt2' else 'down_proj'}.bias"]
    with torch.no_grad(), attach(model, method.on(layers=1)) as run:
        assert close_model(again(**inputs).logits, run(**inputs).logits)
        run.close()
        assert not close_model(again(**inputs).logits, model(**inputs).logits)
    assert getattr(model.config, "mlp_bias", False) is False
    assert fold(model, SteeringVector(0.0, _vectors())).config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("bert", "nothing in bert.encoder.layer.0 gives its output to the stream as it is"),
        ("gemma2", "nothing in model.layers.0 gives its output to the stream as it is"),
        ("mistral", "model.layers.0.mlp.down_proj, a Linear, has no bias"),
        ("bart", "is not the one attention of an item"),
        ("vit", "models that read tokens, not pixel_values"),
    ],
)
def test_where_it_cannot_fold_it_says_why(kind: str, why: str) -> None:
    with pytest.raises(FoldError, match=why):
        fold(models.tiny(kind), SteeringVector(seed=0), only="model.decoder" if kind == "bart" else None)


def test_random_vectors_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1), (1, 0)):
        wanted = torch.randn(6, generator=torch.Generator().manual_seed(1_000_003 * seed + layer))
        assert torch.equal(SteeringVector(seed=seed).added(layer, 6), wanted)
