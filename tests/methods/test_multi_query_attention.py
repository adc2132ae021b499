"""MultiQueryAttention against a llama written out, whose query heads share one key head and one value head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import fold, models, operate
from heedful.adapters.kvcache import cache_bytes
from heedful.conformance.tolerances import close, close_model
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.kinds.weights import HeadWeights
from heedful.methods import MultiQueryAttention
from tests.by_hand import causal_map, heads_of, llama_states

FORMS = ("first", "mean")


def _shared(x: Tensor, form: str) -> Tensor:
    """Keys or values `[b g n d]` of one head: since they are linear, so is what becomes of their weights."""
    return x[:, :1] if form == "first" else sum(x[:, g : g + 1] for g in range(x.shape[1])) / x.shape[1]  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mha", "llama"])
def test_all_query_heads_look_at_one_key_head(kind: str, form: str) -> None:
    model = models.tiny(kind)
    ids = models.tiny_inputs(model)["input_ids"]

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        return heads_of(causal_map(rotate(q), rotate(_shared(k, form))), _shared(v, form))

    with torch.no_grad():
        found = operate(model, MultiQueryAttention(form))(input_ids=ids).logits
        assert close_model(found, model.lm_head(llama_states(model, ids, attend)))


def test_weights_and_biases_head_by_head() -> None:
    k, v = torch.randn(3, 2, 5), torch.randn(3, 4, 5)
    weights = HeadWeights(torch.randn(6, 2, 5), k, v, torch.randn(5, 6, 4), None, torch.randn(3, 2), torch.randn(3, 4))
    for form in FORMS:
        found = MultiQueryAttention(form).operate(weights, Layer(0, 6, 3, 2, 4, 5))
        assert found.q is weights.q
        assert found.o is weights.o
        assert found.q_bias is None
        for name in ("k", "v", "k_bias", "v_bias"):
            given = getattr(weights, name)
            wanted = given[0] if form == "first" else (given[0] + given[1] + given[2]) / 3
            assert getattr(found, name).shape == (1, *given.shape[1:])
            assert close(getattr(found, name)[0], wanted)


def test_a_model_with_one_key_head_stays_as_it_is() -> None:
    model = models.tiny("mqa")
    small = operate(model, MultiQueryAttention("mean"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small.parameters(), strict=True))
    weights = HeadWeights(torch.randn(4, 2, 5), torch.randn(1, 2, 5), torch.randn(1, 2, 5), torch.randn(5, 4, 2))
    assert MultiQueryAttention("mean").operate(weights, Layer(0, 4, 1, 2, 2, 5)) is weights


def test_the_cache_is_as_many_times_smaller_and_decoding_goes_on() -> None:
    model = models.tiny("mha")
    small = operate(model, MultiQueryAttention())
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        whole, shared = (cache_bytes(m(input_ids=ids, use_cache=True).past_key_values) for m in (model, small))
    assert whole == 4 * shared
    how = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    again = small.generate(input_ids=ids, use_cache=False, **how)
    assert torch.equal(small.generate(input_ids=ids, **how), again)


def test_what_is_trained_then_has_the_gradient_of_one_head() -> None:
    model = models.tiny("mha")
    ids = models.tiny_inputs(model)["input_ids"]
    small = operate(model, MultiQueryAttention())
    small(input_ids=ids, labels=ids).loss.backward()

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor, rotate: Any) -> Tensor:
        return heads_of(causal_map(rotate(q), rotate(k[:, :1])), v[:, :1])

    logits = model.lm_head(llama_states(model, ids, attend))
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for mine, theirs in zip(small.model.layers, model.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            grad = getattr(mine.self_attn, name).weight.grad
            assert close(grad, getattr(theirs.self_attn, name).weight.grad[: len(grad)])


@pytest.mark.parametrize("kind", ["mha", "llama", "qwen3"])
def test_it_saves_and_loads(kind: str, tmp_path: Path) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model)
    small = fold(model, MultiQueryAttention("mean"))
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.num_key_value_heads == 1
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, small(**inputs).logits)


def test_models_whose_heads_cannot_share_are_refused() -> None:
    with pytest.raises(
        RefusedModel, match="a key head for every 1 of its query heads, and cannot be told another number"
    ):
        operate(models.tiny("bert"), MultiQueryAttention())


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"MultiQueryAttention.form = 'last': must be 'first' or 'mean'"):
        MultiQueryAttention("last")
    assert MultiQueryAttention().form == "first"
