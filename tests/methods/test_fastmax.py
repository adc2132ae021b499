"""Fastmax against the polynomial of each pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.methods import Fastmax
from tests.methods.linear import Text, agrees, drawn, refuses_a_cache_that_was_cut_back


def _by_hand(text: Text, order: int) -> Tensor:
    q, k = (x - x.sum(1, keepdim=True) / x.shape[1] for x in (text.q, text.k))
    rows = []
    for i in range(len(q)):
        seen = text.seen(i)
        longest = max(q[j].pow(2).sum() for j in range(text.seen(i))).sqrt()
        longest = longest * max(k[j].pow(2).sum() for j in range(seen)).sqrt()
        s = torch.stack([(q[i] * k[j]).sum() / longest for j in range(seen)])
        weights = 1 + s + (s * s / 2 if order == 2 else 0)
        rows.append((weights / weights.sum()) @ text.v[:seen])
    return torch.stack(rows)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_the_polynomial_of_pairs(causal: bool, padded: bool, order: int) -> None:
    agrees(Fastmax(order), lambda text: _by_hand(text, order), causal, padded)


def test_the_second_term_comes_nearer_to_softmax() -> None:
    """Of the same s."""
    bare, call = drawn(causal=False, padded=False)
    values = torch.eye(19, dtype=torch.float64).expand(2, 2, -1, -1)
    q, k = (x - x.mean(-1, keepdim=True) for x in (bare.q, bare.k.repeat_interleave(2, 1)))
    s = q @ k.mT / (q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1))[..., None, None]
    one, two = ((Fastmax(n).attend((bare.q, bare.k, values), call) - s.softmax(-1)).abs().max() for n in (1, 2))
    assert 0 < two < one / 2


def test_equal_channels_make_a_plain_mean() -> None:
    """Centred, such queries are nothing."""
    bare, call = drawn(causal=True, padded=False, shape=Shape(g=4, dv=6))
    found = Fastmax().attend((torch.ones_like(bare.q), bare.k, bare.v), call)
    assert close(found, bare.v.cumsum(2) / torch.arange(1, 20)[:, None])


def test_a_cache_that_was_cut_back_is_refused() -> None:
    refuses_a_cache_that_was_cut_back(Fastmax())


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"Fastmax.order = 3: must be 1 or 2"):
        Fastmax(3)
