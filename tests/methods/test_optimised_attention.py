"""Optimised attention: values are slices of the tokens."""

from __future__ import annotations

import pytest
import torch

from heedful.core.errors import SiteError
from heedful.methods import OptimisedAttention
from tests.methods.sliced import N, agrees, masked, starts, weights_left, written_out


def test_values_are_slices_of_the_tokens() -> None:
    agrees(OptimisedAttention(), lambda x, p: written_out(x, torch.stack([p["key"] @ y for y in x]), x, p))


def test_the_start_and_what_is_left_of_the_weights() -> None:
    starts(OptimisedAttention(), {"query", "key", "out"})
    assert weights_left(OptimisedAttention()) == 0.75


def test_masks_are_refused() -> None:
    with pytest.raises(SiteError, match="layer 0: attention with fewer maps is for images"):
        OptimisedAttention().attend(torch.zeros(1, N, 24), masked({"out": torch.eye(24), "key": torch.eye(24)}))
