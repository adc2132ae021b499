"""LaMamba against ways through an image that are walked patch by patch, and windows in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.authoring import Causal, FieldError, Layer, Mask, Region, SiteError
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.methods import LaMamba
from heedful.methods.mechanisms.recurrent import la_mamba
from tests.images_by_hand import Image, agree, convolved, image_call, image_of, learns_of_an_image, tokens_of

E = 5
Place = tuple[int, int]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _ways(rows: int, cols: int) -> list[list[Place]]:
    """Rows from above and from below, beginning on the left; columns from the left and the right, from below."""
    down, across = list(range(rows)), list(range(cols))
    ways: list[list[Place]] = [[] for _ in range(4)]
    for i in range(rows):
        line = across if i % 2 == 0 else across[::-1]
        ways[0] += [(i, col) for col in line]
        ways[1] += [(rows - 1 - i, col) for col in line]
    for i in range(cols):
        line = down[::-1] if i % 2 == 0 else down
        ways[2] += [(row, i) for row in line]
        ways[3] += [(row, cols - 1 - i) for row in line]
    return ways


def _scanned(image: Image, grid: Place, p: dict[str, Tensor], state: int) -> Image:
    d = len(p["skip"][0])
    inner = convolved({at: p["in"][:d] @ x for at, x in image.items()}, p["near"], p["near_bias"])
    inner = {at: _silu(x) for at, x in inner.items()}
    total = {at: torch.zeros(d, dtype=torch.float64) for at in image}
    for way, path in enumerate(_ways(*grid)):
        held = torch.zeros(d, state, dtype=torch.float64)
        for at in path:
            u = inner[at]
            told = p["told"][way] @ u
            rank = len(told) - 2 * state
            step = torch.log(1 + torch.exp(p["step"][way] @ told[:rank] + p["step_bias"][way]))
            into, out = told[rank : rank + state], told[rank + state :]
            held = torch.stack(
                [
                    torch.stack(
                        [
                            torch.exp(-step[c] * torch.exp(p["rate"][way, c, i])) * held[c, i]
                            + step[c] * into[i] * u[c]
                            for i in range(state)
                        ]
                    )
                    for c in range(d)
                ]
            )
            total[at] = total[at] + held @ out + p["skip"][way] * u
    found = {}
    for at, y in total.items():
        centred = y - y.sum() / d
        normed = centred / ((centred**2).sum() / d + 1e-5) ** 0.5 * p["norm"] + p["norm_bias"]
        found[at] = p["out"] @ (normed * _silu(p["in"][d:] @ image[at]))
    return found


@pytest.mark.parametrize(
    ("grid", "before", "after", "state", "ratio"), [((2, 3), 1, 0, 2, 1), ((3, 2), 0, 1, 1, 2), ((3, 3), 2, 1, 2, 1)]
)
def test_a_scan_goes_four_ways(grid: Place, before: int, after: int, state: int, ratio: int) -> None:
    method = LaMamba(2, 0, state, ratio)
    call, x = image_call(method, grid, before, after, E)
    attended = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def acts(tokens: Tensor, call: Call) -> Tensor:
        return method.scan(attended, replace(call, hidden=tokens)) - attended

    def by_hand(tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
        return tokens_of(_scanned(image_of(tokens, grid, before), grid, p, state), torch.zeros_like(tokens), before)

    agree(acts, by_hand, call, x)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 17])
def test_pieces_side_by_side_are_one_way(tokens: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    sizes = {"x": (3, tokens), "step": (3, tokens), "rate": (3, 2), "into": (2, tokens), "out": (2, tokens)}
    given = {name: torch.randn(2, 4, *size, generator=draw, dtype=torch.float64) for name, size in sizes.items()}
    given |= {"step": given["step"].exp(), "rate": -given["rate"][0].exp()}
    leaves = [x.requires_grad_(True) for x in given.values()]
    found, wanted = la_mamba._scanned(*leaves), []
    x, step, rate, into, out = leaves
    held = torch.zeros(2, 4, 3, 2, dtype=torch.float64)
    for t in range(tokens):
        added = (step[..., t] * x[..., t])[..., None] * into[:, :, None, :, t]
        held = torch.exp(step[..., t, None] * rate) * held + added
        wanted.append((held * out[:, :, None, :, t]).sum(-1))
    assert close(found, torch.stack(wanted, -1))
    grads = [torch.autograd.grad((y - 1).square().mean(), leaves) for y in (found, torch.stack(wanted, -1))]
    for one, other in zip(*grads, strict=True):
        assert close(one, other)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((5, 4), 2, 0), ((5, 4), 3, 1), ((4, 5), 3, 2), ((2, 2), 1, 0), ((3, 3), 3, 1), ((2, 4), 3, 1)],
)
def test_patches_see_their_window(grid: Place, window: int, shift: int) -> None:
    n = 1 + math.prod(grid) + 1
    bare = Bare(Shape(q=n, k=n), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((1, n - 1),), grid)})
    method = LaMamba(window, shift, 2, 1)
    mask = method.narrow(bare.call.mask, bare.call)
    keep = mask.keeps(bare.call.pairs)
    keep = torch.ones(n, n, dtype=torch.bool) if keep is None else keep.expand(1, 1, n, n)[0, 0]
    starts = [0, *range(shift or window, 20, window)]

    def of(i: int) -> tuple[int, ...] | None:
        if not 0 < i < n - 1:
            return None
        at = zip(divmod(i - 1, grid[1]), grid, strict=True)
        # along a side no longer than a window there is one, as in the authors' code
        return tuple(0 if side <= window else sum(start <= x for start in starts) for x, side in at)

    for i in range(n):
        for j in range(n):
            assert bool(keep[i, j]) == (of(i) is None or of(j) is None or of(i) == of(j)), (i, j)


def test_of_few_bits_it_computes_in_more() -> None:
    method = LaMamba(2, 0, 2, 1)
    call, x = image_call(method, (2, 3), 1, 0, E)
    given = x.bfloat16()
    few = method.scan(torch.zeros_like(given), replace(call, hidden=given))
    assert few.dtype is torch.bfloat16
    exact = method.scan(torch.zeros_like(x), replace(call, hidden=given.double()))
    assert float((few - exact).abs().max() / exact.abs().max()) < 0.01


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(LaMamba.example())


def test_what_it_starts_with() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=5, value_dim=6, width=64)
    before = torch.get_rng_state()
    found, again = (LaMamba(state=3).parameters(layer) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "in": (256, 64), "near": (128, 1, 3, 3), "near_bias": (128,), "told": (4, 10, 128), "step": (4, 128, 4),
        "step_bias": (4, 128), "rate": (4, 128, 3), "skip": (4, 128), "norm": (128,), "norm_bias": (128,),
        "out": (64, 128),
    }  # fmt: skip
    other = LaMamba(state=3).parameters(replace(layer, number=0))
    for name, x in found.items():
        assert torch.equal(x, again[name])
        assert torch.equal(x, other[name]) == (name in ("rate", "skip", "norm", "norm_bias"))
    for name, fan in (("in", 64), ("near", 9), ("near_bias", 9), ("told", 128), ("step", 4), ("out", 128)):
        assert 0.97 * fan**-0.5 < float(found[name].max()) <= fan**-0.5
        assert 0.97 * fan**-0.5 < -float(found[name].min()) <= fan**-0.5
    assert close(found["rate"].exp(), torch.tensor([1.0, 2.0, 3.0]).expand(4, 128, 3))
    assert bool((found["skip"] == 1).all())
    assert bool((found["norm"] == 1).all())
    assert not bool(found["norm_bias"].any())
    steps = torch.log(1 + found["step_bias"].double().exp())
    assert 0.001 <= float(steps.min()) < 0.0011
    assert 0.095 < float(steps.max()) <= 0.1001
    assert float(steps.log().mean()) == pytest.approx(math.log(0.01), abs=0.15)
    narrow = LaMamba(state=3).parameters(replace(layer, width=17))
    assert narrow["step"].shape == (4, 34, 2)


def test_what_cannot_be() -> None:
    assert LaMamba() == LaMamba(8, 0, 16, 2)
    assert LaMamba.example() == LaMamba(2, 1, 3, 1)
    assert LaMamba(1, 0, 1, 1).window == 1
    with pytest.raises(FieldError, match=r"window = 0: must be 1 or more; .*8"):
        LaMamba(0)
    for shift in (-1, 7):
        with pytest.raises(FieldError, match=rf"shift = {shift}: must be 0 or more, and less than the window; .*3"):
            LaMamba(7, shift)
    with pytest.raises(FieldError, match=r"state = 0: must be 1 or more; .*16"):
        LaMamba(state=0)
    with pytest.raises(FieldError, match=r"ratio = 0: must be 1 or more; .*2"):
        LaMamba(ratio=0)
    method = LaMamba(2, 0, 2, 1)
    call, x = image_call(method, (2, 3), 1, 0, E)
    with pytest.raises(SiteError, match="layer 0: the layer's input is not known, and is what is scanned"):
        method.scan(x, replace(call, hidden=None))
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches that all see one another"):
        method.scan(x, replace(call, hidden=x, mask=Mask((Causal(),))))
    text = models.tiny("llama")
    with pytest.raises(SiteError, match="layer 0: acts on rows and columns of patches"), attach(text, method) as run:
        run(**models.tiny_inputs(text))
