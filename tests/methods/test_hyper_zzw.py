"""HyperZZW against nets of coordinates, changed kernels and convolutions in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Causal, Layer, Mask
from heedful.core.errors import FieldError, SiteError
from heedful.methods import HyperZZW
from tests.images_by_hand import Image, agree, convolved, image_call, image_of, learns_of_an_image, tokens_of

E = 5


def _line(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return p[name] @ x + p[f"{name}_bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _kernel(p: dict[str, Tensor], name: str, size: int, told: Image | None) -> Image:
    found = {}
    for row in range(size):
        for col in range(size):
            at = torch.tensor([2 * i / (size - 1) - 1 if size > 1 else -1.0 for i in (row, col)], dtype=torch.float64)
            h = torch.sin(_line(p, f"{name}_wave_0", at))
            for i in (1, 2):
                h = torch.sin(_line(p, f"{name}_wave_{i}", at)) * _line(p, f"{name}_mix_{i}", h)
                h = h + p[f"{name}_place"][row, col]
                if told is not None:
                    h = h * _line(p, f"{name}_told_{i}", told[row, col])
            found[row, col] = _line(p, f"{name}_out", h)
    return found


def _pooled(image: Image, n: int, size: int) -> Image:
    """The means of windows that cover the image, `size` of them along each side."""
    spans = [range(i * n // size, -(-(i + 1) * n // size)) for i in range(size)]
    return {
        (y, x): torch.stack([image[row, col] for row in spans[y] for col in spans[x]]).mean(0)
        for y in range(size)
        for x in range(size)
    }


def _standard(image: Image) -> Image:
    all_of_it = torch.stack(list(image.values()))
    mean = all_of_it.sum(0) / len(image)
    spread = ((all_of_it - mean) ** 2).sum(0) / len(image)
    return {at: (x - mean) / (spread + 1e-5) ** 0.5 for at, x in image.items()}


@pytest.mark.parametrize(
    ("side", "kernels", "hidden", "before", "after"),
    [(3, (3,), 4, 1, 0), (4, (1, 5), 3, 0, 2), (2, (), 2, 2, 1)],
)
def test_an_image_changes_kernels_that_it_meets(
    side: int, kernels: tuple[int, ...], hidden: int, before: int, after: int
) -> None:
    method = HyperZZW(side, kernels, hidden)
    call, x = image_call(method, (side, side), before, after, E)

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        image = image_of(tokens, (side, side), before)
        fast = _standard({at: p["mixer"] @ z for at, z in image.items()})
        changed = _kernel(p, "global", side, None)
        branches = [
            {
                (i, j): torch.stack([image[i, m] * changed[i, m] * fast[m, j] for m in range(side)]).sum(0)
                for i, j in image
            }
        ]
        for size in kernels:
            name = f"local_{size}"
            pooled = _pooled(image, side, size)
            told = {at: _gelu(_line(p, f"{name}_told", _line(p, f"{name}_narrow", z))) for at, z in pooled.items()}
            kernel = _kernel(p, name, size, told)
            table = torch.stack([kernel[at] for at in sorted(kernel)], 1).view(E, 1, size, size)
            branches.append({at: z + p[f"{name}_bias"] for at, z in convolved(image, table).items()})
        out = {at: _line(p, "out", torch.cat([branch[at] for branch in branches])) for at in image}
        return tokens_of(out, torch.zeros_like(tokens), before)

    agree(method.mix, by_hand, call, x)


def test_of_few_bits_it_computes_in_more() -> None:
    method = HyperZZW(3, (3,), 4)
    call, x = image_call(method, (3, 3), 1, 0, E)
    few = method.mix(x.bfloat16(), call)
    assert few.dtype is torch.bfloat16
    exact = method.mix(
        x.bfloat16().double(), replace(call, params={n: p.bfloat16().double() for n, p in call.params.items()})
    )
    assert float((few - exact).abs().max() / exact.abs().max()) < 0.01


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(HyperZZW.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=32)
    method = HyperZZW(6, (3, 9), 200)
    before = torch.get_rng_state()
    found, again = (method.parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    other = method.parameters(replace(layer, number=0))
    still = {name for name, x in found.items() if torch.equal(x, other[name])}
    flat = {"out_bias"}
    for name, size in (("global", 6), ("local_3", 3), ("local_9", 9)):
        zero = {f"{name}_{part}" for part in ("wave_0_bias", "wave_1_bias", "wave_2_bias", "place", "out_bias")}
        one = {f"{name}_mix_{i}_bias" for i in (1, 2)}
        if name != "global":
            zero |= {f"{name}_bias"}
            one |= {f"{name}_told_{i}_bias" for i in (1, 2)}
            for part, e in (("narrow", 32), ("told", 200), ("narrow_bias", 32), ("told_bias", 200)):
                bound = e**-0.5
                assert 0.9 * bound < float(found[f"{name}_{part}"].abs().max()) < bound
            for i in (1, 2):
                assert float(found[f"{name}_told_{i}"].abs().max()) == pytest.approx((3 / 200) ** 0.5, rel=0.01)
            assert found[f"{name}_bias"].shape == (1,)
        assert all(bool((found[it] == 0).all()) for it in zero)
        assert all(bool((found[it] == 1).all()) for it in one)
        flat |= zero | one
        for i in (1, 2):
            assert float(found[f"{name}_mix_{i}"].abs().max()) == pytest.approx((3 / 200) ** 0.5, rel=0.01)
        assert float(found[f"{name}_out"].abs().max()) == pytest.approx((3 / 200) ** 0.5 / size, rel=0.01)
        assert found[f"{name}_place"].shape == (size, size)
        for i, shape in enumerate((6, 3, 2)):  # a gamma's square has the mean shape * (shape + 1), the draw's 1 / 6
            squares = found[f"{name}_wave_{i}"].square().mean() / (2 * math.pi) ** 2
            assert float(squares) == pytest.approx(shape * (shape + 1) / 6, rel=0.35)
            assert found[f"{name}_wave_{i}"].shape == (200, 2)
            assert 0.4 < float((found[f"{name}_wave_{i}"] < 0).float().mean()) < 0.6
    assert still == flat
    assert float(found["mixer"].std()) == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert float(found["out"].std()) == pytest.approx((2 / 96) ** 0.5, rel=0.1)
    assert found["out"].shape == (32, 96)
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert bool(x.isfinite().all())


def test_what_cannot_be() -> None:
    assert HyperZZW() == HyperZZW(14, (3, 9, 5, 7), 32)
    assert HyperZZW.example() == HyperZZW(4, (3,), 4)
    assert HyperZZW(2, (1,), 1).side == 2
    with pytest.raises(FieldError, match=r"side = 1: must be 2 or more; .*14"):
        HyperZZW(1)
    for kernels in ((0,), (-1,), (3, 4), (3, 3)):
        with pytest.raises(FieldError, match=r"kernels = .*: must be odd numbers of patches, no two alike; .*\(3, 5\)"):
            HyperZZW(kernels=kernels)
    with pytest.raises(FieldError, match=r"units = 0: must be 1 or more; .*32"):
        HyperZZW(units=0)
    method = HyperZZW(2, (), 2)
    for grid in ((2, 3), (3, 2)):
        call, x = image_call(method, grid, 1, 0, E)
        rows, cols = grid
        with pytest.raises(SiteError, match=f"layer 0: makes kernels of 2 x 2 patches, and there are {rows} x {cols}"):
            method.mix(x, call)
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        method.mix(x, replace(call, mask=Mask((Causal(),))))
