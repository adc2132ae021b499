"""Super attention: values are the tokens mixed by a map over places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.authoring import Layer
from heedful.core.errors import FieldError, SiteError
from heedful.methods import SuperAttention
from tests.methods.sliced import N, agrees, call, masked, starts, weights_left, written_out


def _by_hand(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    mixed = torch.stack([sum(p["places"][i, j] * x[j] for j in range(N)) for i in range(N)])  # type: ignore[misc]
    return written_out(x, x, mixed, p)


def test_values_are_mixed_over_places() -> None:
    agrees(SuperAttention(N), _by_hand)


def test_the_start_and_what_is_left_of_the_weights() -> None:
    starts(SuperAttention(400), {"query", "out", "places"})
    assert SuperAttention(9).parameters(Layer(0, 4, 4, 8, 8, 32))["places"].shape == (9, 9)
    assert weights_left(SuperAttention(5)) == 0.5  # and as many as there are pairs of places: 3/4 where L is the width


def test_errors() -> None:
    with pytest.raises(FieldError, match=r"SuperAttention.tokens = 0: must be 1 or more"):
        SuperAttention(0)
    with pytest.raises(SiteError, match=r"has a map over 9 places, and there are 7 tokens; SuperAttention\(7\) has"):
        SuperAttention(9).attend(torch.zeros(1, N, 24), call({}))
    p = {"out": torch.eye(24), "query": torch.eye(24), "places": torch.eye(N)}
    with pytest.raises(SiteError, match="layer 0: attention with fewer maps is for images"):
        SuperAttention(N).attend(torch.zeros(1, N, 24), masked(p))
