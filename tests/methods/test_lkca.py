"""LKCA against torch's convolution over the grid of patches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from heedful import attach, models
from heedful.authoring import FieldError, Layer, Region, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.methods import LKCA

BEFORE = 2  # tokens before the patches; one comes after them


def _bare(grid: tuple[int, ...]) -> Bare:
    n = BEFORE + torch.Size(grid).numel() + 1
    bare = Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)})
    return bare


def _by_hand(bare: Bare, kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """Each channel of a head convolved with the head's kernel, zeros around the image; other tokens by softmax."""
    value, rows = bare.v.repeat_interleave(2, 1), grid[0] * grid[1]
    image = value[:, :, BEFORE : BEFORE + rows].mT.unflatten(-1, grid).flatten(1, 2)  # [b h*d rows cols]
    kernels = kernel.repeat_interleave(6, 0)[:, None]
    moved = conv2d(image, kernels, padding=kernel.shape[-1] // 2, groups=len(kernels))
    out = (bare.q @ bare.k.repeat_interleave(2, 1).mT / 8**0.5).softmax(-1) @ value
    patches = moved.unflatten(1, (4, 6)).flatten(3).mT
    return torch.cat([out[:, :, :BEFORE], patches, out[:, :, -1:]], 2)


@pytest.mark.parametrize(("grid", "size"), [((5, 7), 3), ((4, 3), 5), ((5, 6), 1), ((3, 4), 11)])
def test_it_is_a_convolution(grid: tuple[int, int], size: int) -> None:
    bare = _bare(grid)
    draw = torch.Generator().manual_seed(size)
    kernel = torch.randn(4, size, size, generator=draw, dtype=torch.float64, requires_grad=True)
    leaves = [kernel, bare.q.requires_grad_(), bare.k.requires_grad_(), bare.v.requires_grad_()]
    want = _by_hand(bare, kernel, grid)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(LKCA(size), backend, rows, {"kernel": kernel})
        assert close(found, want)
    losses = [x.pow(2).sum() for x in (found, want)]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_the_start() -> None:
    layer = Layer(number=1, heads=4, kv_heads=4, head_dim=8, value_dim=8, width=32)
    before = torch.get_rng_state()
    kernel = LKCA(15).parameters(layer)["kernel"]
    assert torch.equal(before, torch.get_rng_state())
    assert close(kernel, (2 * torch.rand(4, 15, 15, generator=torch.Generator().manual_seed(1)) - 1) / 15)
    assert not torch.equal(kernel, LKCA(15).parameters(replace(layer, number=0))["kernel"])


def test_in_a_model_kernels_learn() -> None:
    model = models.tiny("vit", image_size=20)
    inputs = models.tiny_inputs(model)
    with attach(model, LKCA(3)) as run:
        run(**inputs).logits.sum().backward()
        first, last = run.parameters()
        assert bool(first.grad.any())
        assert not bool(last.grad.any())  # the model reads its class token alone


def test_errors() -> None:
    for size in (0, 4, -1):
        with pytest.raises(FieldError, match=rf"LKCA.size = {size}: must be odd, and 1 or more"):
            LKCA(size)
    with pytest.raises(SiteError, match=r"layer 0: a kernel has two sides, and the patches lie on a grid of 3"):
        _bare((2, 2, 3)).run(LKCA(3), "reference")
