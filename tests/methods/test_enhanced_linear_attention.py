"""EnhancedLinearAttention: the sums against weights, and the module against the authors' steps, in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Mask
from heedful.core.regions import Region
from heedful.methods import EnhancedLinearAttention
from tests.images_by_hand import learns_of_an_image
from tests.methods.linear import Text, agrees


@pytest.mark.parametrize("least", [1.0, 20.0, 1000.0])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_products_of_what_is_above_zero(padded: bool, least: float) -> None:
    temperature = torch.tensor([0.5, 0.2, 1.0, 2.0], dtype=torch.float64)

    def by_hand(text: Text) -> Tensor:
        rows = []
        for query in text.q:
            weights = torch.stack([(query.clamp(min=0) * key.clamp(min=0)).sum() for key in text.k])
            rows.append(temperature[text.head] * (weights[:, None] * text.v).sum(0) / weights.sum().clamp(min=least))
        return torch.stack(rows)

    agrees(EnhancedLinearAttention(3, least), by_hand, causal=False, padded=padded, params={"temperature": temperature})


def _image(grid: tuple[int, int], before: int, after: int, kernel: int) -> tuple[Bare, dict[str, Tensor], Tensor]:
    n = before + math.prod(grid) + after
    bare = Bare(Shape(q=n, k=n, e=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((before, n - after),), grid)}, mask=Mask())
    params = parameters(EnhancedLinearAttention(kernel), bare.shape.layer, torch.float64)
    draw = torch.Generator().manual_seed(1)
    for name in ("norm", "norm_bias", "inner", "inner_bias"):
        params[name] = params[name] + torch.rand(6, generator=draw, dtype=torch.float64)
    return bare, params, torch.randn(2, n, 6, generator=draw, dtype=torch.float64)


def _normed(x: list[Tensor]) -> list[Tensor]:
    mean = sum(x) / len(x)
    variance = sum((one - mean) ** 2 for one in x) / len(x)
    return [(one - mean) / (variance + 1e-5) ** 0.5 for one in x]  # type: ignore[operator]


def _module(output: Tensor, p: dict[str, Tensor], grid: tuple[int, int], before: int) -> Tensor:
    """What is added to each token, `[b n e]`."""
    rows, cols = grid
    out = torch.zeros_like(output)
    for b in range(len(output)):
        image = {}
        for y in range(rows):
            for x in range(cols):
                token = torch.stack(_normed(list(output[b, before + y * cols + x])))
                image[y, x] = token * p["norm"] + p["norm_bias"]
        for name in ("first", "second"):
            side, made = p[name].shape[-1], {}
            for y, x in image:
                made[y, x] = p[f"{name}_bias"]
                for dy in range(side):
                    for dx in range(side):
                        near = image.get((y + dy - side // 2, x + dx - side // 2))
                        if near is not None:
                            made[y, x] = made[y, x] + p[name][:, dy, dx] * near
            image = made
            if name == "first":
                grown = [z * (1 + torch.erf(z / math.sqrt(2))) / 2 for z in image.values()]
                image = dict(zip(image, (z * p["inner"] + p["inner_bias"] for z in _normed(grown)), strict=True))
        for (y, x), local in image.items():
            out[b, before + y * cols + x] = local
    return out


@pytest.mark.parametrize(
    ("grid", "before", "after", "kernel"), [((3, 4), 1, 0, 3), ((2, 5), 0, 2, 5), ((2, 2), 1, 1, 1)]
)
def test_patches_get_what_two_convolutions_make_of_them(
    grid: tuple[int, int], before: int, after: int, kernel: int
) -> None:
    bare, params, output = _image(grid, before, after, kernel)
    call = replace(bare.call, params=params)
    named = [x for name, x in params.items() if name != "temperature"]
    leaves = [output, *named]
    for x in leaves:
        x.requires_grad_(True)
    found = EnhancedLinearAttention(kernel).concentrate(output, call)
    wanted = output + _module(output, params, grid, before)
    assert close(found, wanted)
    losses = [(x - 1).square().mean() for x in (found, wanted)]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other, 512)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(EnhancedLinearAttention.example())


def test_the_start() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=16, value_dim=8, width=300)
    before = torch.get_rng_state()
    found, again = (EnhancedLinearAttention(3).parameters(layer) for _ in range(2))
    other = EnhancedLinearAttention(3).parameters(replace(layer, number=0))
    assert torch.equal(before, torch.get_rng_state())
    assert found["temperature"].tolist() == [0.25] * 4
    for name in ("norm", "inner"):
        assert found[name].tolist() == [1.0] * 300
        assert found[f"{name}_bias"].tolist() == [0.0] * 300
    for name, shape in (
        ("first", (300, 3, 3)),
        ("second", (300, 3, 3)),
        ("first_bias", (300,)),
        ("second_bias", (300,)),
    ):
        assert found[name].shape == shape
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
        assert 0.32 < float(found[name].max()) <= 1 / 3
        assert -1 / 3 <= float(found[name].min()) < -0.32
    assert not torch.equal(found["first"], found["second"])


def test_where_softmax_stays_and_what_cannot_be() -> None:
    call = _image((2, 3), 1, 1, 3)[0].call
    assert not EnhancedLinearAttention().idle(call)
    assert EnhancedLinearAttention().idle(replace(call, mask=Mask((Causal(),))))
    for kernel in (0, 4, -1):
        with pytest.raises(FieldError, match=rf"kernel = {kernel}: must be odd, and 1 or more"):
            EnhancedLinearAttention(kernel)
    for least in (0.0, float("inf")):
        with pytest.raises(FieldError, match=rf"least = {least}: must be above 0"):
            EnhancedLinearAttention(3, least)
    assert EnhancedLinearAttention() == EnhancedLinearAttention(7, 100.0)
    assert EnhancedLinearAttention.example() == EnhancedLinearAttention(3, 1.0)
