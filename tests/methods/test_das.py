"""DAS against convolutions and samples between patches in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError, SiteError
from heedful.methods import DAS
from tests.images_by_hand import Image, agree, convolved, image_call, image_of, learns_of_an_image, tokens_of

E = 5


def _between(image: Image, y: Tensor, x: Tensor) -> Tensor:
    """What stands at a place between patches: each of the four around it as near as it is, none off the image."""
    top, left = math.floor(y.item()), math.floor(x.item())
    total = torch.zeros_like(image[0, 0])
    for row in (top, top + 1):
        for column in (left, left + 1):
            if (row, column) in image:
                total = total + image[row, column] * (1 - (y - row).abs()) * (1 - (x - column).abs())
    return total


def _normed(image: Image) -> Image:
    """Each channel over its image."""
    x = torch.stack(list(image.values()))
    mean = x.sum(0) / len(x)
    spread = (((x - mean) ** 2).sum(0) / len(x) + 1e-5) ** 0.5
    return {at: (value - mean) / spread for at, value in image.items()}


@pytest.mark.parametrize(
    ("grid", "before", "after", "method"),
    [((3, 4), 1, 0, DAS(0.4, 3)), ((4, 2), 0, 2, DAS(1.0, 1)), ((2, 3), 2, 1, DAS(0.2, 5))],
)
def test_samples_tell_the_gate(grid: tuple[int, int], before: int, after: int, method: DAS) -> None:
    call, x = image_call(method, grid, before, after, E)
    k, half = method.kernel, method.kernel // 2

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        image = image_of(tokens, grid, before)
        told = convolved(convolved(image, p["depth"]), p["narrow"])
        told = {at: y * (1 + torch.erf(y / math.sqrt(2))) / 2 for at, y in _normed(told).items()}
        offset = convolved(told, p["offset"], p["offset_bias"])
        found = {}
        for row, column in image:
            seen = torch.zeros(E, dtype=torch.float64)
            for i in range(k):
                for j in range(k):
                    down, across = offset[row, column][2 * (i * k + j)], offset[row, column][2 * (i * k + j) + 1]
                    sample = _between(told, row + i - half + down, column + j - half + across)
                    seen = seen + p["look"][:, :, i, j] @ sample
            mean = seen.sum() / E
            normed = (seen - mean) / (((seen - mean) ** 2).sum() / E + 1e-5) ** 0.5 * p["norm"] + p["norm_bias"]
            found[row, column] = image[row, column] / (1 + torch.exp(-normed))
        return tokens_of(found, tokens, before)

    agree(method.gate, by_hand, call, x)


def test_of_few_bits_it_computes_in_more() -> None:
    method = DAS(0.4)
    call, x = image_call(method, (2, 3), 1, 0, E)
    few = method.gate(x.bfloat16(), call)
    assert few.dtype is torch.bfloat16
    assert float((few - method.gate(x.bfloat16().double(), call)).abs().max()) < 0.05


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(DAS.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=40)
    before = torch.get_rng_state()
    found, again = (DAS().parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "depth": (40, 1, 3, 3), "narrow": (8, 40, 1, 1),
        "offset": (18, 8, 3, 3), "offset_bias": (18,), "look": (40, 8, 3, 3), "norm": (40,), "norm_bias": (40,),
    }  # fmt: skip
    other = DAS().parameters(replace(layer, number=0))
    for name in ("depth", "narrow", "look"):
        assert torch.equal(found[name], again[name])
        assert not torch.equal(found[name], other[name])
    for name, value in (("offset", 0), ("offset_bias", 0), ("norm", 1), ("norm_bias", 0)):
        assert bool((found[name] == value).all())
    assert DAS(0.01).parameters(layer)["narrow"].shape == (1, 40, 1, 1)


def test_what_cannot_be() -> None:
    assert DAS() == DAS(0.2, 3)
    assert DAS.example() == DAS(0.5)
    for share in (0.0, -0.1, 1.1):
        with pytest.raises(FieldError, match=rf"share = {share}: must be above 0, and 1 at most; .*0.2"):
            DAS(share)
    for kernel in (0, -1, 4):
        with pytest.raises(FieldError, match=rf"kernel = {kernel}: must be odd, and 1 or more; .*3"):
            DAS(kernel=kernel)
    call, x = image_call(DAS(0.4), (2, 3), 1, 0, E)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        DAS(0.4).gate(x, replace(call, mask=Mask((Causal(),))))
