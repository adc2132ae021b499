"""PairwiseCrossAttention against a softmax over two images' tokens, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, Mask
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.methods import PairwiseCrossAttention

BATCH, HEADS, N = 5, 4, 3


def _set_up() -> tuple[Call, tuple[Tensor, Tensor, Tensor]]:
    bare = Bare(Shape(b=BATCH, h=HEADS, g=2, q=N, k=N, d=4, dv=5), dtype=torch.float64, rules=())
    return replace(bare.call, mask=Mask(), scale=0.3, softcap=2.0), (bare.q, bare.k, bare.v)


def _by_hand(qkv: tuple[Tensor, Tensor, Tensor], pairs: list[bool]) -> Tensor:
    """Heads where those images see the one before them too that `pairs` says."""
    q, k, v = qkv
    found = torch.zeros(BATCH, HEADS, N, v.shape[-1], dtype=torch.float64)
    for b in range(BATCH):
        for h in range(HEADS):
            group = h // 2
            for i in range(N):
                images = [b, b - 1] if pairs[b] else [b]
                seen = [(image, j) for image in images for j in range(N)]
                scores = torch.stack([2 * torch.tanh(0.3 * q[b, h, i] @ k[a, group, j] / 2) for a, j in seen])
                weights = scores.exp() / scores.exp().sum()
                found[b, h, i] = sum(w * v[a, group, j] for w, (a, j) in zip(weights, seen, strict=True))
    return found


def _drawn(share: float, seed: int, forward: int) -> list[bool]:
    draw = torch.Generator().manual_seed(1_000_003 * seed + forward)
    return [x < share for x in torch.rand(BATCH, generator=draw).tolist()]


@pytest.mark.parametrize(("share", "seed", "forward"), [(1.0, 0, 0), (0.5, 0, 1), (0.5, 3, 4)])
def test_some_images_see_the_one_before_them(share: float, seed: int, forward: int) -> None:
    call, qkv = _set_up()
    call = replace(call, forward=forward)
    pairs = _drawn(share, seed, forward)
    assert any(pairs)
    leaves = [x.requires_grad_() for x in qkv]
    found, wanted = PairwiseCrossAttention(share, seed).distract(qkv, call), _by_hand(qkv, pairs)
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_layers_draw_alike_and_forwards_do_not() -> None:
    call, qkv = _set_up()
    method = PairwiseCrossAttention(0.5)
    one = method.distract(qkv, call)
    assert torch.equal(one, method.distract(qkv, replace(call, layer=3)))
    assert not torch.equal(one, method.distract(qkv, replace(call, forward=1)))
    assert not torch.equal(one, PairwiseCrossAttention(0.5, 1).distract(qkv, call))


def test_a_model_is_distracted_while_it_trains_alone() -> None:
    model = models.tiny("vit", image_size=16)
    inputs = models.tiny_inputs(model)
    plain = model(**inputs).logits
    with attach(model, PairwiseCrossAttention(1.0)) as run:
        model.train()
        assert not torch.equal(run(**inputs).logits, plain)
        model.eval()
        assert torch.equal(run(**inputs).logits, plain)


def test_where_it_rests_and_what_cannot_be() -> None:
    call, _ = _set_up()
    method = PairwiseCrossAttention()
    assert not method.idle(replace(call, training=True))
    assert method.idle(replace(call, training=False))
    assert method.idle(replace(call, training=True, cross=True))
    assert method.idle(replace(call, training=True, mask=Mask((Causal(),))))
    assert PairwiseCrossAttention(0.0).idle(replace(call, training=True))
    assert method == PairwiseCrossAttention(0.5, 0)
    assert PairwiseCrossAttention.example() == PairwiseCrossAttention(1.0)
    assert PairwiseCrossAttention.neutral() == PairwiseCrossAttention(0.0)
    for share in (-0.1, 1.1):
        with pytest.raises(FieldError, match=rf"share = {share}: must lie from 0 to 1; .*0.5"):
            PairwiseCrossAttention(share)
