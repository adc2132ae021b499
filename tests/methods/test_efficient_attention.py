"""EfficientAttention against the paper's two softmaxes, in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.tolerances import close
from heedful.methods import EfficientAttention
from tests.methods.linear import Text, agrees, drawn


def _maps(text: Text) -> Tensor:
    """The weights that are never made: of each channel a softmax over places, mixed by the query's softmax."""
    n = len(text.q)
    out = torch.zeros(n, len(text.k), dtype=torch.float64)
    rows = []
    for i in range(n):
        seen = text.seen(i)
        row = out[i]
        for c in range(text.q.shape[1]):
            share = text.q[i, c].exp() / text.q[i].exp().sum()
            of = text.k[:seen, c].exp()
            row = row + share * torch.cat([of / of.sum(), row.new_zeros(len(text.k) - seen)])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_each_channel_is_a_map_and_queries_mix_them(causal: bool, padded: bool) -> None:
    agrees(EfficientAttention(), lambda text: _maps(text) @ text.v, causal, padded)


def test_rows_of_the_weights_sum_to_one() -> None:
    bare, call = drawn(causal=True, padded=False)
    found = EfficientAttention().attend((bare.q, bare.k, torch.ones_like(bare.v)), call)
    assert close(found, torch.ones_like(found))


def test_keys_far_below_those_to_come_leave_finite_numbers() -> None:
    """What a channel of so low keys weighs is lost, and the other channels stand as they are."""
    bare, call = drawn(causal=True, padded=False)
    q, k, v = (x.float() for x in (bare.q, bare.k, bare.v))
    k[:, :, -1, 0] = 400.0
    k[:, :, -2, 1] = 95.0  # below the least normal number, not below the least
    leaves = [x.requires_grad_(True) for x in (q, k, v)]
    found = EfficientAttention().attend(tuple(leaves), call)
    for x in (found, *torch.autograd.grad(found.sum(), leaves)):
        assert bool(x.isfinite().all())
    share = torch.softmax(q, -1)[..., 2:]
    first = (share.sum(-1)[..., :1] * v[:, :, 0].repeat_interleave(2, 1)).detach()
    assert close(found[:, :, 0].detach(), first)
