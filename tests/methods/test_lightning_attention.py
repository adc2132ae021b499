"""LightningAttention against the paper's recurrence, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import SiteError
from heedful.methods import LightningAttention
from heedful.methods.mechanisms.linear.lightning_attention import slopes
from tests.methods.linear import PADDED, drawn
from tests.samples import within

SLOPES = {4: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], 6: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]}


def _recurrent(q: Tensor, k: Tensor, v: Tensor, rates: list[float]) -> Tensor:
    """One text, `[h n d]`: a state that fades, and a norm over all heads of a token."""
    rows = []
    state = torch.zeros(len(q), q.shape[2], v.shape[2], dtype=q.dtype)
    fade = torch.tensor([math.exp(-r) for r in rates], dtype=q.dtype)[:, None, None]
    for i in range(q.shape[1]):
        key, query = (x[:, i] / (1 + (-x[:, i]).exp()) for x in (k, q))
        state = fade * state + key[:, :, None] * v[:, i, None]
        out = (query[:, None] @ state)[:, 0]
        rows.append(out / (out.pow(2).mean() + 1e-6).sqrt())
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("layer", "depth"), [(0, 1), (0, 3), (1, 3), (2, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_a_state_that_fades(padded: bool, layer: int, depth: int) -> None:
    for heads, groups in ((4, 2), (6, 6)):
        bare, call = drawn(causal=True, padded=padded, shape=Shape(h=heads, g=groups, dv=6))
        leaves = [x.requires_grad_(True) for x in (bare.q, bare.k, bare.v)]
        found = LightningAttention().attend(tuple(leaves), within(call, layer, depth))
        rates = [s * (1 - layer / max(depth - 1, 1) + 1e-5) for s in SLOPES[heads]]
        text = PADDED if padded else PADDED | True
        for b in range(2):
            keep = text[b].nonzero().flatten()
            k, v = (x[b, :, keep].repeat_interleave(heads // groups, 0) for x in (bare.k, bare.v))
            wanted = _recurrent(bare.q[b, :, keep], k, v, rates)
            assert close(found[b, :, keep], wanted, 1024)
            weight = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
            slopes_found, slopes_wanted = (
                torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (found[b, :, keep], wanted)
            )
            assert all(close(x, y, 4096) for x, y in zip(slopes_found, slopes_wanted, strict=True))


def test_slopes_are_those_of_the_authors() -> None:
    for heads, wanted in SLOPES.items():
        assert slopes(heads) == wanted
    assert slopes(1) == [2.0**-8]
    assert slopes(12)[8:] == slopes(16)[0:8:2]


def test_a_call_that_is_not_causal_is_refused() -> None:
    bare, call = drawn(causal=False, padded=False)
    with pytest.raises(SiteError, match=r"layer 0: a decay needs a causal call; restrict the method with .on"):
        LightningAttention().attend((bare.q, bare.k, bare.v), call)
