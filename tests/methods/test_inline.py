"""InLine against the paper's weights and the authors' local kernel, in loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape, parameters
from heedful.conformance.tolerances import close
from heedful.core.mask import Mask
from heedful.core.regions import Region
from heedful.methods import InLine
from tests.methods.linear import Text, agrees, drawn


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Of one query: q k scale / n less their mean, plus 1 / n."""
    n = len(k)
    s = torch.stack([(q * key).sum() * scale / n for key in k])
    return s - s.mean() + 1 / n


def _by_hand(text: Text) -> Tensor:
    return torch.stack(
        [_weights(text.q[i], text.k[: text.seen(i)], text.scale) @ text.v[: text.seen(i)] for i in range(len(text.q))]
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_normalised_by_subtraction(causal: bool, padded: bool) -> None:
    agrees(InLine(), _by_hand, causal, padded)


def test_twice_the_query_is_another_row() -> None:
    """Which division by the sum would not tell apart; rows sum to one all the same."""
    bare, call = drawn(causal=False, padded=False)
    once, twice = (InLine().attend((x, bare.k, bare.v), call) for x in (bare.q, 2 * bare.q))
    mean = bare.v.mean(2, keepdim=True).repeat_interleave(2, 1)
    assert close(twice - mean, 2 * (once - mean))
    ones = InLine().attend((bare.q, bare.k, torch.ones_like(bare.v)), call)
    assert close(ones, torch.ones_like(ones))


def _image(grid: tuple[int, int], before: int, after: int) -> tuple[Bare, dict[str, Tensor]]:
    n = before + grid[0] * grid[1] + after
    bare = Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((before, n - after),), grid)}, mask=Mask())
    params = parameters(InLine(), bare.shape.layer, torch.float64)
    return bare, {name: x.requires_grad_(True) for name, x in params.items()}


def _local(bare: Bare, p: dict[str, Tensor], grid: tuple[int, int], before: int) -> Tensor:
    """A head's part of the mean token makes, through two maps and a GELU, nine weights for each channel of values."""
    b, h, n, dv = 2, 4, bare.q.shape[2], bare.v.shape[3]
    part = bare.hidden.shape[2] // h
    out = torch.zeros(b, h, n, dv, dtype=torch.float64)
    rows, cols = grid
    for text in range(b):
        mean = bare.hidden[text].sum(0) / n
        for head in range(h):
            x = p["in"][head] @ mean[head * part : (head + 1) * part] + p["in_bias"][head]
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            kernel = (p["out"][head] @ x + p["out_bias"][head]).view(dv, 3, 3)
            v = bare.v[text, head // 2]
            for y in range(rows):
                for x_ in range(cols):
                    for dy in (-1, 0, 1):
                        for dx in (-1, 0, 1):
                            if 0 <= y + dy < rows and 0 <= x_ + dx < cols:
                                near = v[before + (y + dy) * cols + x_ + dx]
                                out[text, head, before + y * cols + x_] += kernel[:, dy + 1, dx + 1] * near
    return out


@pytest.mark.parametrize(("grid", "before", "after"), [((3, 4), 1, 0), ((2, 5), 0, 2)])
def test_patches_get_their_neighbours_by_the_images_own_kernel(grid: tuple[int, int], before: int, after: int) -> None:
    bare, params = _image(grid, before, after)
    leaves = [bare.v.requires_grad_(True), *params.values()]
    found, _ = bare.run(InLine(), "reference", params=params)
    bare.call = replace(bare.call, roles={})
    plain, _ = bare.run(InLine(), "reference", params=params)
    wanted = _local(bare, params, grid, before)
    assert close(found - plain, wanted)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    slopes = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (found - plain, wanted)]
    for slope, want in zip(*slopes, strict=True):
        assert bool(want.any())
        assert close(slope, want, 512)


def test_it_is_part_of_a_vision_transformer() -> None:
    model = models.tiny("vit")
    inputs = models.tiny_inputs(model)
    with attach(model, InLine()) as run:
        run(**inputs).logits.sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if "InLine" in name}
    assert len(grads) == 8
    # what patches get in the last layer reaches no class
    assert [bool(x.any()) for x in grads.values()] == [True] * 4 + [False] * 4


def test_causal_calls_and_rows_of_patches_have_no_local_kernel() -> None:
    bare, params = _image((3, 4), 1, 0)
    row, spans = Region(((1, 13),), (12,)), ((1, 13),)
    for change in ({"roles": {"patches": row}}, {"roles": {"patches": spans}}, {"cross": True}):
        was = bare.call
        bare.call = replace(was, roles={})
        without, _ = bare.run(InLine(), "reference", params=params)
        bare.call = replace(was, **change)
        found, _ = bare.run(InLine(), "reference", params=params)
        assert torch.equal(found, without)
        bare.call = was


def test_first_weights_are_drawn_by_layer() -> None:
    layer = Shape().layer
    first, again = InLine().parameters(layer), InLine().parameters(layer)
    other = InLine().parameters(replace(layer, number=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    for name, fan in (("in", 6), ("in_bias", 6), ("out", 8), ("out_bias", 8)):
        assert 0.8 * fan**-0.5 < float(first[name].abs().max()) < fan**-0.5
        assert float(first[name].min()) < 0 < float(first[name].max())
    assert {name: tuple(x.shape) for name, x in first.items()} == {
        "in": (4, 8, 6), "in_bias": (4, 8), "out": (4, 72, 8), "out_bias": (4, 72),
    }  # fmt: skip
