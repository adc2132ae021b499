"""Frames and windows that stand where heads would are not taken for heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.coverage.probe import Look
from heedful import attach
from heedful.conformance.tolerances import close_model
from heedful.core.errors import NotEntered, RefusedModel

from .samples import Zero


class Framed(nn.Module):
    """Attention within each frame of a film `[b e t h w]`, as in VidTok's autoencoder: `[b t n e]` of one head.

    With channels `last` films are `[b t h w e]`.
    """

    def __init__(self, heads: int = 1, told: int | None = None, last: bool = False) -> None:
        super().__init__()
        self.several, self.num_heads, self.at, self.qkv = heads, told, -1 if last else 1, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.at, -1)
        q, k, v = self.qkv(x).flatten(2, 3).chunk(3, -1)  # [b t n e]
        if self.several > 1:  # over all places, of which there are as many as in a frame
            q, k, v = (y.flatten(1, 2).unflatten(-1, (self.several, -1)).transpose(1, 2) for y in (q, k, v))
            found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            found = F.scaled_dot_product_attention(q, k, v)
        return found.reshape(x.shape).movedim(-1, self.at)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("told", [1, 2, None])
@pytest.mark.parametrize("frames", [3, 2])
@torch.no_grad()
def test_frames_are_no_heads(frames: int, told: int | None, last: bool) -> None:
    net = nn.Sequential(Framed(told=told, last=last)).eval()
    film = torch.randn((2, frames, 4, 5, 8) if last else (2, 8, frames, 4, 5))
    with pytest.raises(RefusedModel, match=r"0 \(Framed: an axis of frames or windows stands where heads would\)"):
        attach(net, Look(), inputs=film)


@torch.no_grad()
def test_heads_over_all_places_of_a_film_are_heads() -> None:
    net, x = nn.Sequential(Framed(heads=2)).eval(), torch.randn(3, 8, 2, 4, 4)
    native = net(x)
    with attach(net, Zero().on(heads=[1]), inputs=x) as run:
        found = run(x)
    assert close_model(found[:, :4], native[:, :4])
    assert not found[:, 4:].any()


@torch.no_grad()
def test_a_layer_keeps_the_heads_that_it_had_when_it_was_looked_at() -> None:
    net = nn.Sequential(Framed()).eval()
    with attach(net, Look(), inputs=torch.randn(2, 8, 1, 4, 4)) as run:
        run(torch.randn(2, 8, 1, 4, 4))
        with pytest.raises(NotEntered, match="3 heads, which were 1"):
            run(torch.randn(2, 8, 3, 4, 4))
