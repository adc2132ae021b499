"""GlobalSubsampledAttention: summaries of windows against the authors' steps in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.methods import GeneralizedNeighborhoodAttention, GlobalSubsampledAttention
from tests.images_by_hand import learns_of_an_image

BEFORE = 2  # tokens before the patches


def _bare(grid: tuple[int, int], **shape: int) -> Bare:
    n = BEFORE + math.prod(grid) + 1
    bare = Bare(Shape(q=n, k=n, dv=6, **shape), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)}, mask=Mask())
    return bare


def _params(bare: Bare, stride: int) -> dict[str, Tensor]:
    found = parameters(GlobalSubsampledAttention(stride), bare.shape.layer, torch.float64)
    draw = torch.Generator().manual_seed(3)
    return found | {name: found[name] + torch.rand(24, generator=draw).double() for name in ("norm", "norm_bias")}


def _by_hand(bare: Bare, p: dict[str, Tensor], grid: tuple[int, int], stride: int) -> Tensor:
    s, (high, wide) = bare.shape, grid
    assert bare.hidden is not None
    others = [i for i in range(s.q) if not BEFORE <= i < BEFORE + high * wide]
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        summaries = []
        for top in range(0, high, stride):
            for left in range(0, wide, stride):
                x = p["reduce_bias"]
                for dy in range(stride):
                    for dx in range(stride):
                        token = BEFORE + (top + dy) * wide + left + dx
                        x = x + p["reduce"][:, :, dy, dx] @ bare.hidden[b, token]
                centred = x - x.mean()
                x = centred / (centred.square().mean() + 1e-5).sqrt()
                summaries.append(x * p["norm"] + p["norm_bias"])
        for h in range(s.h):
            g = h * s.g // s.h
            keys = [p["key"][g] @ x + p["key_bias"][g] for x in summaries] + [bare.k[b, g, j] for j in others]
            values = [p["value"][g] @ x + p["value_bias"][g] for x in summaries] + [bare.v[b, g, j] for j in others]
            for i in range(s.q):
                weights = torch.stack([bare.q[b, h, i] @ key / 8**0.5 for key in keys]).softmax(0)
                out[b, h, i] = weights @ torch.stack(values)
    return out


@pytest.mark.parametrize(("grid", "stride"), [((4, 6), 2), ((3, 6), 3), ((4, 4), 4)])
def test_all_tokens_see_windows_as_one(grid: tuple[int, int], stride: int) -> None:
    bare = _bare(grid)
    params = _params(bare, stride)
    want = _by_hand(bare, params, grid, stride)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(GlobalSubsampledAttention(stride), backend, rows, params)
        assert close(found, want)


def test_the_first_steps_loss_and_gradient_are_those_of_the_loops() -> None:
    bare = _bare((4, 4))
    params = _params(bare, 2)
    assert bare.hidden is not None
    leaves = [*params.values(), bare.q, bare.k, bare.v, bare.hidden]
    for x in leaves:
        x.requires_grad_(True)
    heads = bare.run(GlobalSubsampledAttention(2), "reference", params=params)[0]
    losses = [(x - 1).square().mean() for x in (heads, _by_hand(bare, params, (4, 4), 2))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_only_summaries_columns_are_computed() -> None:
    n = 32 * 32
    bare = Bare(Shape(q=n, k=n, b=1), rules=())
    call = replace(bare.call, roles={"patches": Region(((0, n),), (32, 32))})
    mask = GlobalSubsampledAttention(4).narrow(call.mask, call)
    assert mask.columns(call.queries.take(slice(5, 7)), call.keys, slice(5, 7)) == ((0, 64),)


def test_summaries_reach_everywhere_in_one_layer_and_windows_do_not() -> None:
    model = models.tiny("vit", image_size=16)  # 4 x 4 patches
    pixels = models.tiny_inputs(model)["pixel_values"][:1].requires_grad_(True)
    for method, far in (
        (GlobalSubsampledAttention(2), True),
        (GeneralizedNeighborhoodAttention((2, 2), (2, 2)), False),
    ):
        with attach(model, method) as run:
            first = run(pixel_values=pixels, output_hidden_states=True).hidden_states[1][0, 1]
        (slope,) = torch.autograd.grad(first.square().sum(), pixels)
        reached = slope.abs().sum((0, 1)).unflatten(0, (4, -1)).unflatten(2, (4, -1)).sum((1, 3)) > 0
        assert bool(reached[:2, :2].all())
        assert bool(reached.all()) is far
        assert bool(reached[2:].any()) is far


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(GlobalSubsampledAttention.example())


def test_the_start() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=200)
    before = torch.get_rng_state()
    found, again = (GlobalSubsampledAttention(2).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "reduce": (200, 200, 2, 2), "reduce_bias": (200,), "norm": (200,), "norm_bias": (200,),
        "key": (2, 5, 200), "key_bias": (2, 5), "value": (2, 6, 200), "value_bias": (2, 6),
    }  # fmt: skip
    assert GlobalSubsampledAttention(1).parameters(layer) == {}
    other = GlobalSubsampledAttention(2).parameters(replace(layer, number=0))
    for name, most in (("reduce", 800**-0.5), ("reduce_bias", 800**-0.5), ("key", 200**-0.5), ("value", 200**-0.5)):
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
        assert 0.9 * most < float(found[name].max()) <= most
        assert -most <= float(found[name].min()) < -0.9 * most
    assert bool((found["norm"] == 1).all())
    assert not bool(found["norm_bias"].any())


def test_where_softmax_stays_and_what_cannot_be() -> None:
    call = _bare((4, 6)).call
    assert not GlobalSubsampledAttention(2).idle(call)
    assert GlobalSubsampledAttention(2).idle(replace(call, mask=Mask((Causal(),))))
    assert GlobalSubsampledAttention(1).idle(call)
    with pytest.raises(FieldError, match=r"stride = 0: must be 1 or more"):
        GlobalSubsampledAttention(0)
    assert GlobalSubsampledAttention().stride == 2
    assert GlobalSubsampledAttention.example().stride == 2
    assert GlobalSubsampledAttention.neutral() == GlobalSubsampledAttention(1)
    with pytest.raises(FieldError, match=r"stride = 4: must divide both sides of the 4 x 6 patches of layer 0"):
        GlobalSubsampledAttention(4).narrow(call.mask, call)
    with pytest.raises(FieldError, match=r"stride = 9: must divide both sides"):
        GlobalSubsampledAttention(9).sum_up_keys(torch.zeros(2, 2, 27, 8), call)
    with pytest.raises(SiteError, match="sums up the block's input, and it is handed none"):
        GlobalSubsampledAttention(2).sum_up_keys(torch.zeros(2, 2, 27, 8), replace(call, hidden=None))
