"""ReplyLanguage: a difference of means on top of what attention blocks give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, fold, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, FoldError, InactiveWarning
from heedful.methods.intervene.language.reply_language import ReplyLanguage


def _vectors(layers: int = 2, width: int = 32) -> Fitted:
    draw = torch.Generator().manual_seed(5)
    return Fitted({f"v.{i}": torch.randn(width, generator=draw) for i in range(layers)})


def _by_hand(model: Any, vectors: Fitted, strength: float, layers: tuple[int, ...], **inputs: Tensor) -> Tensor:
    """The logits where a hook adds each layer's vector behind its output projection."""
    handles = [
        model.model.layers[i].self_attn.o_proj.register_forward_hook(
            lambda _, args, out, i=i: out + strength * vectors[f"v.{i}"]
        )
        for i in layers
    ]
    with torch.no_grad():
        found = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_the_vector_is_added_behind_the_attention(layers: tuple[int, ...]) -> None:
    model, vectors = models.tiny("llama"), _vectors()
    inputs = models.tiny_inputs(model)
    wanted = _by_hand(model, vectors, -1.5, layers, **inputs)
    with torch.no_grad(), attach(model, ReplyLanguage(-1.5, vectors).on(layers=layers)) as run:
        assert close_model(run(**inputs).logits, wanted)
        run.close()
        assert not close_model(wanted, model(**inputs).logits)


def _texts(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, a mask with padding on either side, and which of the texts are in the language."""
    ids = models.tiny_inputs(model, batch=4, length=7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[3, 5:] = 0
    return ids, mask, torch.tensor([True, False, False, True])


def _outputs(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """What each output projection gives, by hooks."""
    seen: list[Tensor] = []
    handles = [
        layer.self_attn.o_proj.register_forward_hook(lambda _, args, out: seen.append(out.double()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("marked", [False, True])
def test_a_fit_takes_the_difference_of_the_means_of_all_tokens(marked: bool) -> None:
    model = models.tiny("llama")
    ids, mask, positive = _texts(model)
    counts = mask.bool()
    batch = {"input_ids": ids, "attention_mask": mask, "positive": positive}
    if marked:
        counts = torch.zeros_like(counts)
        counts[:, 3:5] = True
        batch["response"] = counts
    fitted = fit(ReplyLanguage(), model, [batch]).vectors
    for layer, seen in enumerate(_outputs(model, ids, mask)):
        means: dict[bool, list[Tensor]] = {True: [], False: []}
        for row, flag in enumerate(positive.tolist()):
            tokens = [seen[row, j] for j in range(7) if counts[row, j]]
            means[flag].append(torch.stack(tokens).sum(0) / len(tokens))
        wanted = sum(means[True]) / 2 - sum(means[False]) / 2
        assert close(fitted[f"v.{layer}"].float(), wanted.float())
    assert sorted(fitted) == [f"v.{i}" for i in range(2)]
    assert "positive" in batch  # what is given stays as it was
    rows = [
        {**{name: x[i : i + 1] for name, x in batch.items()}, "positive": bool(flag)}
        for i, flag in enumerate(positive.tolist())
    ]
    for name, x in fit(ReplyLanguage(), model, rows).vectors.items():
        assert close_model(x.float(), fitted[name].float())


def test_one_language_s_mean_is_moved_onto_the_other_s() -> None:
    """In a single layer, what is given on the mean of the texts without it is then that of the texts with it."""
    model = models.tiny("llama")
    ids, mask, positive = _texts(model)
    method = fit(ReplyLanguage(), model, [{"input_ids": ids, "attention_mask": mask, "positive": positive}])
    given = _outputs(model, ids, mask)[1]
    shares = mask.double() / mask.sum(1, keepdim=True)
    mean = torch.einsum("bn,bne->be", shares, given)
    assert close((mean[~positive].mean(0) + method.vectors["v.1"]).float(), mean[positive].mean(0).float())


def test_generated_tokens_alone() -> None:
    model, vectors = models.tiny("llama"), _vectors()
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad(), attach(model, ReplyLanguage(2.0, vectors).when("decode")) as run:
        first = run(input_ids=ids[:, :-1], use_cache=True)
        second = run(input_ids=ids[:, -1:], **{CACHE: first[CACHE]}).logits
    with torch.no_grad():
        assert close_model(first.logits, model(input_ids=ids[:, :-1]).logits)
        assert not close_model(second[:, -1], model(input_ids=ids).logits[:, -1])


@pytest.mark.parametrize("has", [True, False])
def test_it_folds_into_the_bias_of_the_projection(has: bool) -> None:
    model, method = models.tiny("llama", attention_bias=has), ReplyLanguage(-1.5, _vectors())
    inputs = models.tiny_inputs(model)
    if has:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    folded = fold(model, method.on(layers=1))
    with torch.no_grad():
        assert close_model(folded(**inputs).logits, _by_hand(model, method.vectors, -1.5, (1,), **inputs))
        assert torch.equal(fold(model, ReplyLanguage(0.0))(**inputs).logits, model(**inputs).logits)
    with pytest.raises(FoldError, match=r"o_proj, a Linear, has no bias, .* its config has no switch for one"):
        fold(models.tiny("mistral"), method)


def test_random_vectors_are_the_seeds_own() -> None:
    for seed, layer in ((3, 2), (0, 1), (1, 0)):
        wanted = -2 * torch.randn(6, generator=torch.Generator().manual_seed(1_000_003 * seed + layer))
        assert torch.equal(ReplyLanguage(-2.0, seed=seed).added(layer, 6), wanted)


def test_without_strength_nothing_is_asked_for() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), pytest.warns(InactiveWarning), attach(model, ReplyLanguage(0.0)) as run:
        assert torch.equal(run(**inputs).logits, model(**inputs).logits)


def test_errors() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with pytest.raises(FieldError, match=r"ReplyLanguage.strength = inf: must be finite"):
        ReplyLanguage(float("inf"))
    with (
        pytest.raises(FieldError, match=r"to texts with and without the trait.*heedful.fit\(ReplyLanguage"),
        attach(model, ReplyLanguage()) as run,
    ):
        run(**inputs)
    for fitted in (_vectors(layers=1), _vectors(width=31)):
        with pytest.raises(FieldError, match="fit to this model"), attach(model, ReplyLanguage(1.0, fitted)) as run:
            run(**inputs)
    with pytest.raises(FieldError, match=r"ReplyLanguage.batches.*need 'positive' in each"):
        fit(ReplyLanguage(), model, [inputs])
    for batches in ([], [{**inputs, "positive": True}], [{**inputs, "positive": False}]):
        with pytest.raises(FieldError, match="must hold positive and other texts"):
            fit(ReplyLanguage(), model, batches)
