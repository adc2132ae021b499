"""SPANet against Fourier's sums over rows and columns, and convolutions in loops."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.methods import SPANet
from tests.images_by_hand import Image, agree, convolved, image_call, image_of, learns_of_an_image, tokens_of

E = 5


def _balanced(image: Image, grid: tuple[int, int], low: float, radius: float) -> Image:
    (high, wide), out = grid, {place: torch.zeros_like(x) for place, x in image.items()}
    for u in range(high):
        for v in range(wide):
            turns = {(y, x): 2j * math.pi * (u * y / high + v * x / wide) for y, x in image}
            wave = sum(x * cmath.exp(-turns[place]) for place, x in image.items()) / (high * wide)
            far = (min(u, high - u) ** 2 + min(v, wide - v) ** 2) ** 0.5
            wave = wave * (low if far < radius else 1 - low)
            out = {place: x + (wave * cmath.exp(turns[place])).real for place, x in out.items()}
    return out


@pytest.mark.parametrize(
    ("grid", "before", "after", "method"),
    [
        ((3, 4), 1, 0, SPANet((0.7, 0.2), 1.5, 3)),
        ((4, 2), 0, 2, SPANet((0.9,), 1.0, 5)),
        ((3, 3), 2, 1, SPANet((0.7, 0.8, 0.9), 2.0, 1)),
    ],
)
def test_a_convolved_image_times_its_balanced_parts(
    grid: tuple[int, int], before: int, after: int, method: SPANet
) -> None:
    call, x = image_call(method, grid, before, after, E)
    sizes = {1: [5], 2: [3, 2], 3: [2, 2, 1]}[len(method.balances)]

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        image = image_of(tokens, grid, before)
        for name in ("in", "across", "down"):
            image = convolved(image, p[name], p[f"{name}_bias"])
        told, start = {place: torch.zeros(E, dtype=torch.float64) for place in image}, 0
        for i, (size, low) in enumerate(zip(sizes, method.balances, strict=True)):
            part = _balanced({at: x[start : start + size] for at, x in image.items()}, grid, low, method.radius)
            weight, bias = p[f"part_{i}"][:, :, 0, 0], p[f"part_{i}_bias"]
            told = {at: told[at] + weight @ x + bias for at, x in part.items()}
            start += size
        image = convolved({at: x * told[at] for at, x in image.items()}, p["out"], p["out_bias"])
        return tokens_of(image, torch.zeros_like(tokens), before)

    agree(method.mix, by_hand, call, x)


def test_halves_change_no_frequency() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert close(SPANet()._balanced(x, 0.5), x / 2)
    both = SPANet()._balanced(x, 1.0) + SPANet()._balanced(x, 0.0)
    assert close(both, x)


def test_of_few_bits_it_computes_in_more() -> None:
    method = SPANet((0.7,), 1.0, 1)
    call, x = image_call(method, (2, 3), 1, 0, E)
    few = method.mix(x.bfloat16(), call)
    assert few.dtype is torch.bfloat16
    assert float((few - method.mix(x.bfloat16().double(), call)).abs().max()) < 0.05


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(SPANet.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=32)
    before = torch.get_rng_state()
    found, again = (SPANet(kernel=3).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items() if "bias" not in name} == {
        "in": (32, 32, 1, 1), "across": (32, 1, 1, 3), "down": (32, 1, 3, 1), "part_0": (32, 11, 1, 1),
        "part_1": (32, 11, 1, 1), "part_2": (32, 10, 1, 1), "out": (32, 32, 1, 1),
    }  # fmt: skip
    other = SPANet(kernel=3).parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert not torch.equal(x, other[name])


def test_what_cannot_be() -> None:
    assert SPANet() == SPANet((0.7, 0.8, 0.9), 2.0, 7)
    assert SPANet.example() == SPANet(kernel=3)
    assert SPANet((0.0, 1.0), 0.0, 1).radius == 0
    for balances in ((), (0.5, 1.1), (-0.1,)):
        with pytest.raises(FieldError, match=r"balances = .*: .*must (hold one or more|lie from 0 to 1)"):
            SPANet(balances)
    for radius in (-0.5, math.inf):
        with pytest.raises(FieldError, match=rf"radius = {radius}: must be 0 or more"):
            SPANet(radius=radius)
    for kernel in (0, -1, 4):
        with pytest.raises(FieldError, match=rf"kernel = {kernel}: must be odd, and 1 or more; .*7"):
            SPANet(kernel=kernel)
    with pytest.raises(FieldError, match=r"balances = .*: must not be more than the 2 channels of the model"):
        SPANet().parameters(Layer(0, 1, 1, 2, 2, 2))
    call, x = image_call(SPANet(kernel=1), (2, 3), 1, 0, E)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        SPANet(kernel=1).mix(x, replace(call, mask=Mask((Causal(),))))
