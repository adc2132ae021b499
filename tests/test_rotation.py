"""Rotations read off a class's forward: by which branch they are reached, and which can be done to anything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heedful.adapters.bound import Bound
from heedful.adapters.rotation import rotation
from heedful.core.errors import RefusedModel

X, COS, SIN = torch.randn(3, 2, 1, 5, 4, generator=torch.Generator().manual_seed(0))


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    return tuple(x * cos + x.roll(2, -1) * sin for x in (q, k))


def attended(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q + k + v


class Branched(nn.Module):
    """Rotates in the second branch alone."""

    def __init__(self, placeless: bool) -> None:
        super().__init__()
        self.placeless = placeless

    def forward(self, x: Tensor, position_embeddings: Any) -> Tensor:
        q = k = x
        if self.placeless:
            q = q + 0
        else:
            cos, sin = position_embeddings
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return attended(self, q, k, x)


def apply_partly_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    cos, sin = (x.unsqueeze(unsqueeze_dim) for x in (cos, sin))
    turned = (x[..., :2] * cos + x[..., :2].roll(1, -1) * sin for x in (q, k))
    return tuple(torch.cat([a, x[..., 2:]], -1) for a, x in zip(turned, (q, k), strict=True))


class Partly(nn.Module):
    """Rotates a part of each head."""

    def forward(self, x: Tensor, position_embeddings: Any) -> Tensor:
        q = k = x
        cos, sin = position_embeddings
        q, k = apply_partly_rotary(q, k, cos, sin)
        return attended(self, q, k, x)


class Turned(nn.Module):
    """Rotates by angles in another order than the function names them."""

    def forward(self, x: Tensor, position_embeddings: Any) -> Tensor:
        q = k = x
        cos, sin = position_embeddings
        q, k = apply_rotary_pos_emb(q, k, sin, cos)
        return attended(self, q, k, x)


def rotated_in(module: nn.Module, cos: Tensor = COS, sin: Tensor = SIN) -> Any:
    bound = Bound(None, module, "attention", 0, "eager", rotary=(cos, sin))  # type: ignore[arg-type]
    return rotation(bound)


def test_a_branch_is_told_from_the_other() -> None:
    assert rotated_in(Branched(placeless=True)) is None
    assert torch.equal(rotated_in(Branched(placeless=False))(X), X * COS + X.roll(2, -1) * SIN)


def test_angles_that_are_not_handed_as_they_are_named_are_refused() -> None:
    with pytest.raises(RefusedModel, match="in a way of its own"):
        rotated_in(Turned())(X)


def test_layers_that_are_handed_the_same_angles_turn_alike() -> None:
    one = rotated_in(Branched(placeless=False))
    assert one == rotated_in(Branched(placeless=False))
    assert len({one, rotated_in(Branched(placeless=False))}) == 1
    for other in (
        rotated_in(Branched(False), COS + 0),
        rotated_in(Branched(False), COS, SIN + 0),
        rotated_in(Partly()),
    ):
        assert one != other


def test_one_vector_is_turned_for_every_token_of_every_text() -> None:
    cos, sin = torch.randn(2, 2, 5, 2, generator=torch.Generator().manual_seed(1))
    one = torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(2))
    found = rotated_in(Partly(), cos, sin)(one)
    assert found.shape == (2, 3, 5, 4)
    for text in range(2):
        for token in range(5):
            (c, d), (s, t) = cos[text, token], sin[text, token]
            a, b, *rest = one[0, :, 0].T
            assert torch.equal(found[text, :, token], torch.stack([a * c + b * s, b * d + a * t, *rest], -1))
