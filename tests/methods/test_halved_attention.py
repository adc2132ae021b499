"""Halved attention: keys and values are slices of the tokens."""

from __future__ import annotations

import pytest
import torch

from heedful.core.errors import SiteError
from heedful.methods import HalvedAttention
from tests.methods.sliced import N, agrees, masked, starts, weights_left, written_out


def test_keys_and_values_are_slices_of_the_tokens() -> None:
    agrees(HalvedAttention(), lambda x, p: written_out(x, x, x, p))


def test_the_start_and_what_is_left_of_the_weights() -> None:
    starts(HalvedAttention(), {"query", "out"})
    assert weights_left(HalvedAttention()) == 0.5


def test_masks_are_refused() -> None:
    with pytest.raises(SiteError, match="layer 0: attention with fewer maps is for images"):
        HalvedAttention().attend(torch.zeros(1, N, 24), masked({"out": torch.eye(24)}))
