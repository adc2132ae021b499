"""LLNAttention against the paper's features and blocks, in loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods import LLNAttention
from tests.methods.linear import Text, agrees, drawn, refuses_a_cache_that_was_cut_back

A, B = 0.14855178144710912, -0.35487039130661086  # of the authors' code


def _features(text: Text) -> Tensor:
    """The linear half. Spreads take no part in gradients, as in the authors' code."""
    rows, scaled = [], []
    for i in range(len(text.k)):
        var_q = text.q[: text.seen(i)].detach().var(correction=0)
        var_k = text.k[: text.seen(i)].detach().var(correction=0)
        both = ((var_q * var_k - B) / (2 * A)).sqrt()
        scaled.append((both / var_k.sqrt() * text.k[i]).exp())
        rows.append((both / var_q.sqrt() * text.q[i]).exp())
    out = []
    for i in range(len(text.q)):
        weights = torch.stack([(rows[i] * scaled[j]).sum() for j in range(text.seen(i))])
        out.append((weights / weights.sum()) @ text.v[: text.seen(i)])
    return torch.stack(out)


def _blocks(text: Text, size: int) -> Tensor:
    out = []
    for i in range(len(text.q)):
        near = [j for j in range(text.seen(i)) if j // size == i // size]
        weights = torch.stack([(text.q[i] * text.k[j]).sum() / math.sqrt(text.q.shape[1]) for j in near]).softmax(0)
        out.append(weights @ text.v[near])
    return torch.stack(out)


# one query head a key head, since the spread of queries is that of a group
ALONE = Shape(g=4, dv=6)


@pytest.mark.parametrize("block", [None, 0, 5, 7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_features_and_blocks_are_averaged(causal: bool, padded: bool, block: int | None) -> None:
    def by_hand(text: Text) -> Tensor:
        if block == 0:
            return _features(text)
        return (_features(text) + _blocks(text, block or text.q.shape[1])) / 2

    agrees(LLNAttention(block), by_hand, causal, padded, ALONE)


def test_a_group_of_query_heads_has_one_spread() -> None:
    bare, call = drawn(causal=False, padded=False)
    found = LLNAttention(0).attend((bare.q, bare.k, bare.v), call)
    var_q = bare.q.unflatten(1, (2, 2)).var((2, 3, 4), correction=0)[..., None, None]
    var_k = bare.k.var((2, 3), correction=0)[..., None, None]
    both = ((var_q * var_k - B) / (2 * A)).sqrt()
    q = (bare.q * (both / var_q.sqrt()).repeat_interleave(2, 1)).exp()
    weights = q @ (bare.k * both / var_k.sqrt()).exp().repeat_interleave(2, 1).mT
    assert close(found, weights / weights.sum(-1, keepdim=True) @ bare.v.repeat_interleave(2, 1))


def test_spreads_follow_the_scale() -> None:
    """Scores that the model scales otherwise spread otherwise."""
    bare, call = drawn(causal=False, padded=False, shape=ALONE)
    object.__setattr__(call, "scale", 1.0)
    found = LLNAttention(0).attend((bare.q, bare.k, bare.v), call)
    var_q, var_k = (x.var((2, 3), correction=0)[..., None, None] for x in (bare.q, bare.k))
    both = ((8 * var_q * var_k - B) / (2 * A)).sqrt()  # heads are 8 wide
    weights = (bare.q * both / var_q.sqrt()).exp() @ (bare.k * both / var_k.sqrt()).exp().mT
    assert close(found, weights / weights.sum(-1, keepdim=True) @ bare.v)


def test_equal_keys_leave_finite_numbers() -> None:
    bare, call = drawn(causal=True, padded=True)
    q, k = (torch.ones_like(x).requires_grad_(True) for x in (bare.q, bare.k))
    found = LLNAttention().attend((q, k, bare.v), call)
    for x in (found, *torch.autograd.grad(found.sum(), (q, k))):
        assert bool(x.isfinite().all())


def test_it_is_as_concentrated_as_softmax_whatever_the_temperature() -> None:
    """The variance of log-weights follows that of scores."""
    draw = torch.Generator().manual_seed(0)
    for size in (1.0, 1.4):
        q, k = (size * torch.randn(1, 1, 256, 64, generator=draw, dtype=torch.float64) for _ in range(2))
        _, call = drawn(causal=False, padded=False, shape=Shape(b=1, h=1, g=1, q=256, k=256, d=64, dv=256))
        weights = LLNAttention(0).attend((q, k, torch.eye(256, dtype=torch.float64)[None, None]), call)
        mine, soft = weights.log().var(), (q @ k.mT / 8).var()
        assert 0.6 * soft < mine < 1.5 * soft


def test_a_cache_that_was_cut_back_is_refused() -> None:
    refuses_a_cache_that_was_cut_back(LLNAttention())


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"LLNAttention.block = -1: must be 0 or more, or None"):
        LLNAttention(-1)
