"""RectifiedSpaAttn: kept blocks, what they stand for and what stands in for the others, against loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import ClashError, FieldError
from heedful.core.mask import Causal, Mask
from heedful.methods import HaloAttention, RectifiedSpaAttn

# tokens, size of a block, least share, mass; as many blocks are kept as either asks for
CASES = [
    (18, 4, 0.0, 0.0),
    (18, 4, 0.5, 0.1),
    (16, 4, 0.25, 0.7),
    (19, 2, 0.1, 0.4),
    (7, 8, 0.3, 0.3),
    (12, 1, 0.2, 0.5),
]


def _bare(n: int, near: float = 1.0) -> Bare:
    """Tokens of a block are alike but for a share `near` of what they are."""
    bare = Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())
    for x in (bare.q, bare.k):
        for i in range(0, n, 4):
            x[:, :, i : i + 4] = near * x[:, :, i : i + 4] + (1 - near) * x[:, :, i : i + 1]
    return bare


def _by_hand(bare: Bare, size: int, least: float, mass: float) -> tuple[Tensor, int, int]:
    """Heads, and how many pairs of blocks are stood in for and how many are left to the kept ones."""
    s = bare.shape
    blocks = [list(range(s.q)[i : i + size]) for i in range(0, s.q, size)]
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    stood_in = left = 0

    def mean(x: list[Tensor]) -> Tensor:
        return sum(x) / len(x)  # type: ignore[return-value]

    for b in range(s.b):
        for h in range(s.h):
            q, k, v = bare.q[b, h], bare.k[b, h // 2], bare.v[b, h // 2]
            keys = [mean([k[j] for j in block]) for block in blocks]
            for block in blocks:
                query = mean([q[i] for i in block])
                query_off = mean([(q[i] - query).abs() for i in block])
                pooled = torch.stack([query @ key / 8**0.5 for key in keys]).softmax(0)
                order = sorted(range(len(blocks)), key=lambda n, pooled=pooled: -float(pooled[n].detach()))
                kept, sofar = [], 0.0
                for n in order:
                    if sofar > mass and len(kept) >= int(least * len(blocks)):
                        break
                    kept.append(n)
                    sofar += float(pooled[n].detach())
                others, share = torch.zeros(s.dv, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
                for n, other in enumerate(blocks):
                    key_off = mean([(k[j] - keys[n]).abs() for j in other])
                    pays = (query @ keys[n]).abs() > (query_off @ keys[n]).abs() + (query @ key_off).abs()
                    if n not in kept and bool(pays):
                        others = others + pooled[n] * mean([v[j] for j in other])
                        stood_in += 1
                    else:
                        share = share + pooled[n]
                        left += n not in kept
                seen = [j for n in sorted(kept) for j in blocks[n]]
                for i in block:
                    weights = torch.stack([q[i] @ k[j] / 8**0.5 for j in seen]).softmax(0)
                    out[b, h, i] = share * (weights @ v[seen]) + others
    return out, stood_in, left


@pytest.mark.parametrize("near", [1.0, 0.1])
@pytest.mark.parametrize(("n", "size", "least", "mass"), CASES)
def test_rows_keep_the_weight_of_what_is_skipped(n: int, size: int, least: float, mass: float, near: float) -> None:
    bare = _bare(n, near)
    want, *_ = _by_hand(bare, size, least, mass)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(RectifiedSpaAttn(least, mass, size), backend, rows)
        assert close(found, want)


def test_some_blocks_are_stood_in_for_and_some_are_not() -> None:
    _, stood_in, left = _by_hand(_bare(18, 0.1), 4, 0.0, 0.0)
    assert stood_in > 20
    assert left > 10


def test_blocks_of_like_tokens_are_full_attention() -> None:
    """Then a mean is every token, and nothing is lost."""
    bare = _bare(16, 0.0)
    found, _ = bare.run(RectifiedSpaAttn(0.0, 0.0, 4), "reference")
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    assert close(found, (bare.q @ k.mT / 8**0.5).softmax(-1) @ v)


def test_it_is_differentiable() -> None:
    bare = _bare(18, 0.3)
    leaves = [bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    heads = bare.run(RectifiedSpaAttn(0.2, 0.2, 4), "reference")[0]
    losses = [(x - 1).square().mean() for x in (heads, _by_hand(bare, 4, 0.2, 0.2)[0])]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert close(one, other, 512)


def test_an_image_model_is_served() -> None:
    model = models.tiny("vit", image_size=16)
    with torch.no_grad(), attach(model, RectifiedSpaAttn.example()) as run:
        assert run.difference(**models.tiny_inputs(model)) > 0


@pytest.mark.parametrize("first", [True, False])
def test_keys_that_another_method_hides_are_not_stood_in_for(first: bool) -> None:
    model, mine, other = models.tiny("vit", image_size=16), RectifiedSpaAttn.example(), HaloAttention(1, 0)
    with pytest.raises(ClashError, match="what is skipped is stood in for by means of whole blocks"):
        _ = mine | other if first else other | mine
    with torch.no_grad(), attach(model, mine.on(layers=0) | other.on(layers=1)) as run:
        assert run.difference(**models.tiny_inputs(model)) > 0


def test_where_plain_attention_stays_and_what_cannot_be() -> None:
    call = _bare(8).call
    assert not RectifiedSpaAttn().idle(call)
    assert RectifiedSpaAttn(1.0).idle(call)
    assert RectifiedSpaAttn().idle(replace(call, mask=Mask((Causal(),))))
    for field, value in (("least", -0.1), ("least", 1.1), ("mass", -0.1), ("mass", 1.0), ("block", 0)):
        with pytest.raises(FieldError, match=rf"RectifiedSpaAttn\.{field} = {value}"):
            RectifiedSpaAttn(**{field: value})
    assert RectifiedSpaAttn() == RectifiedSpaAttn(0.25, 0.3, 128)
    assert RectifiedSpaAttn.neutral().least == 1.0
    assert RectifiedSpaAttn.example() == RectifiedSpaAttn(0.2, 0.2, 4)
