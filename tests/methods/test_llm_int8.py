"""LLMInt8: inputs rounded token by token, columns of outliers apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models, operate
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods import Absmax, LLMInt8
from tests.by_hand import causal_map, heads_of, llama_states


def by_hand(x: Tensor, threshold: float, bits: int) -> Tensor:
    """One text `[n e]`."""
    top = 2 ** (bits - 1) - 1
    out = x.clone()
    apart = [e for e in range(x.shape[1]) if any(abs(v) >= threshold for v in x[:, e].tolist())]
    for n in range(x.shape[0]):
        together = [e for e in range(x.shape[1]) if e not in apart]
        largest = max((abs(x[n, e].item()) for e in together), default=0.0)
        for e in together:
            out[n, e] = round(x[n, e].item() * top / largest) * largest / top
    return out


def test_a_token_shares_a_scale_and_outlier_columns_stay() -> None:
    x = torch.randn(2, 5, 7)
    x[0, 2, 3] = -6.0  # reaches it
    x[0, 4, 1] = 5.99
    x[1, 0, 6] = 40.0
    method = LLMInt8()
    found = method.rounded(x, torch.ones(1, 5, dtype=torch.bool))
    for row, got in zip(x, found, strict=True):
        assert close(got, by_hand(row, 6.0, 8))
    assert torch.equal(found[0, :, 3], x[0, :, 3])
    assert torch.equal(found[1, :, 6], x[1, :, 6])
    assert not torch.equal(found[1, :, 3], x[1, :, 3])  # an outlier of the other text


def test_padding_has_no_outliers() -> None:
    x = torch.randn(1, 4, 6)
    x[0, 0, 2] = 50.0
    is_text = torch.tensor([[False, True, True, True]])
    found = LLMInt8().rounded(x, is_text)
    assert close(found[0, 1:], by_hand(x[0, 1:], 6.0, 8))
    assert not torch.equal(found[0, 1:, 2], x[0, 1:, 2])


def test_padding_has_none_at_either_place() -> None:
    call = Bare(text=torch.arange(19)[None] < torch.tensor([[19], [14]])).call
    shown, heads = torch.rand(2, 19, 32), torch.rand(2, 4, 19, 8)
    shown[1, 14:] = heads[1, :, 14:] = 50.0
    method = LLMInt8(6.0, 3)
    assert close(method.shown(shown, call)[1, :14], by_hand(shown[1, :14], 6.0, 3))
    found = method.handed_on(heads, call).transpose(1, 2).flatten(2)
    assert close(found[1, :14], by_hand(heads.transpose(1, 2).flatten(2)[1, :14], 6.0, 3))


def test_all_columns_apart_and_none() -> None:
    x = torch.randn(1, 4, 6) + 3
    text = torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(LLMInt8(0.0).rounded(x, text), x)
    assert close(LLMInt8(1e9, 4).rounded(x, text)[0], by_hand(x[0], 1e9, 4))


def test_what_a_model_says_under_it() -> None:
    """Both inputs of attention are rounded, after the norm and before the output projection; its weights too."""
    model = models.tiny("llama", dtype=torch.float64)
    ids = models.tiny_inputs(model)["input_ids"][:1, :7]
    small = operate(model, Absmax(4))
    method = LLMInt8(1.0, 3)
    with torch.no_grad():
        with attach(small, method) as run:
            found = run(input_ids=ids).logits

        class Rounded(torch.nn.Module):
            def __init__(self, inner: Any) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(by_hand(x[0], 1.0, 3)[None])

        for layer in small.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, Rounded(getattr(layer.self_attn, name)))
        states = llama_states(small, ids, lambda i, q, k, v, rotate: heads_of(causal_map(rotate(q), rotate(k)), v))
        assert close_model(found, small.lm_head(states))
        assert not close_model(found, model(input_ids=ids).logits)


def test_defaults_and_what_is_wrong() -> None:
    assert LLMInt8() == LLMInt8(6.0, 8)
    assert LLMInt8.neutral() == LLMInt8(0.0)
    for wrong in ({"threshold": -0.1}, {"threshold": float("inf")}, {"bits": 1}, {"bits": 9}):
        with pytest.raises(FieldError, match=rf"LLMInt8\.{next(iter(wrong))} = "):
            LLMInt8(**wrong)
    assert LLMInt8(bits=2).bits == 2
