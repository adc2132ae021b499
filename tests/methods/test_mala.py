"""MALA: the linear form against the whole map of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask, Padding, Window
from heedful.core.positions import Positions
from heedful.methods.mechanisms.linear.mala import MALA, features


def _weights(q: Tensor, k: Tensor, keep: Tensor, scale: float) -> Tensor:
    """The map that MALA never makes, row by row, in the authors' terms: mean key, scale and number of keys."""
    out = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            seen = keep[b, i].nonzero().flatten()
            if not len(seen):
                continue
            phi_q = torch.nn.functional.elu(q[b, :, i]) + 1
            phi_k = torch.nn.functional.elu(k[b][:, seen]) + 1
            z = scale * (phi_q * phi_k.mean(1)).sum(-1, keepdim=True)
            s = scale * torch.einsum("hd,hkd->hk", phi_q, phi_k) / len(seen)
            out[b, :, i, seen] = (1 + 1 / z) * s - z / len(seen)
    return out


def _case(causal: bool, text: Tensor | None = None, g: int = 2) -> tuple[Bare, Tensor]:
    rules = (Causal(),) if causal else ()
    bare = Bare(Shape(g=g), rules=rules, text=text)
    keep = torch.ones(2, 19, 19, dtype=torch.bool)
    if causal:
        keep = keep.tril()
    return bare, keep if text is None else keep & text[:, None]


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_linear_form_is_the_quadratic_form(causal: bool, padded: bool, chunk: int) -> None:
    text = torch.ones(2, 19, dtype=torch.bool)
    text[0, :6] = False
    text[1, 15:] = False
    bare, keep = _case(causal, text if padded else None)
    call = replace(bare.call, mask=Mask((*((Causal(),) if causal else ()), *((Padding(text),) if padded else ()))))
    q, k, v = bare.q.double(), bare.k.double(), bare.v.double()
    weights = _weights(q, k.repeat_interleave(2, 1), keep, call.scale)
    wanted = weights @ v.repeat_interleave(2, 1)
    assert close(MALA(chunk).attend((q, k, v), call), wanted)
    assert close(MALA(chunk).attend((q.float(), k.float(), v.float()), call), wanted.float())
    sums = weights.sum(-1)
    assert close(sums, keep.any(-1)[:, None].expand_as(sums).double())


def test_weights_can_be_negative_and_larger_features_sharpen_them() -> None:
    """Plain linear attention cannot tell phi(q) from 4 phi(q)."""
    bare, keep = _case(causal=False)
    q = bare.q.double().abs()  # above zero, where phi(q) = q + 1 and so 4 phi(q) = phi(4 q + 3)
    k = bare.k.double().repeat_interleave(2, 1)
    once, four = (_weights(x, k, keep, bare.call.scale) for x in (q, 4 * q + 3))
    assert bool((four < 0).any())
    plain = features(q) @ features(k).mT
    plain = plain / plain.sum(-1, keepdim=True)
    assert close(four - plain, 4 * (once - plain))


def test_features_far_below_zero_keep_their_size() -> None:
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0])
    assert close(features(x)[1:], torch.nn.functional.elu(x[1:]) + 1)
    assert 0 < float(features(x)[0]) < 1e-12  # elu(x) + 1 is 0 in float32


def test_a_query_without_keys_gets_zeros_and_finite_gradients() -> None:
    text = torch.zeros(2, 19, dtype=torch.bool)
    bare = Bare(text=text)
    leaves = [x.requires_grad_(True) for x in (bare.q, bare.k, bare.v)]
    heads, _ = bare.run(MALA(), "reference")
    assert not bool(heads.any())
    for grad in torch.autograd.grad(heads.sum(), leaves):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("kind", ["llama", "mha", "mqa", "odd_head_dim"])
def test_prefill_and_decode_are_the_full_forward(kind: str) -> None:
    model = models.tiny(kind)
    ids = models.tiny_inputs(model, length=14)["input_ids"]
    with torch.no_grad(), attach(model, MALA(chunk=3)) as run:
        whole = run(input_ids=ids, use_cache=False).logits
        first = run(input_ids=ids[:, :6], use_cache=True)
        second = run(input_ids=ids[:, 6:13], **{CACHE: first[CACHE]}, use_cache=True)
        third = run(input_ids=ids[:, 13:], **{CACHE: second[CACHE]}, use_cache=True)
    assert close_model(torch.cat([first.logits, second.logits, third.logits], 1), whole)


def test_left_padding_changes_nothing_given_positions() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, MALA()) as run:
        whole = run(input_ids=ids).logits
        found = run(input_ids=padded, attention_mask=mask, position_ids=position).logits
        text = run.generate(input_ids=padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
        bare = run.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert close_model(found[:, 5:], whole)
    assert torch.equal(text[:, 17:], bare[:, 12:])


def test_a_preallocated_cache_has_empty_columns_after_the_last() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad(), attach(model, MALA()) as run:
        plain = run.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
        fixed = run.generate(input_ids=ids, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(plain, fixed)


def test_an_encoder_sees_every_token() -> None:
    model = models.tiny("bert")
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, MALA()) as run:
        before = run(**inputs).logits
        inputs["input_ids"][:, -1] = 5
        after = run(**inputs).logits
    assert not bool((before == after).all(-1).any())


def test_evicted_caches_have_their_new_keys_last() -> None:
    k = torch.randn(1, 1, 8, 4, dtype=torch.float64)
    q, v = torch.randn(1, 1, 2, 4, dtype=torch.float64), torch.randn(1, 1, 8, 4, dtype=torch.float64)
    index = torch.tensor([0, 1, 5, 6, 7, 0, 20, 21])[None, None]
    is_filled = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)[None, None]
    bare = Bare(Shape(b=1, h=1, g=1))
    keys = Positions(index, index, is_filled=is_filled)
    call = replace(
        bare.call, heads=1, kv_heads=1, queries=Positions.row(20, 2), keys=keys, scale=0.5, mask=Mask((Causal(),))
    )
    keep = (is_filled[0, 0] & (index[0, 0] <= torch.tensor([[20], [21]])))[None]
    assert close(MALA().attend((q, k, v), call), _weights(q, k, keep, 0.5) @ v)


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"MALA.chunk = 0: must be 1 or more"):
        MALA(0)
    with pytest.raises(SiteError, match="causality and padding only"):
        Bare(rules=(Causal(), Window(4))).run(MALA(), "reference")
    assert MALA.neutral() is None
