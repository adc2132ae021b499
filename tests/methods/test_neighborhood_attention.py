"""NeighborhoodAttention against the authors' rule in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.entry import Layer
from heedful.core.errors import FieldError
from heedful.core.regions import Region
from heedful.methods import NeighborhoodAttention

BEFORE = 2  # tokens before the patches


def starts(i: int, length: int, size: int) -> int:
    """The authors' kernel: where the window of patch i begins."""
    r = size // 2
    return max(i - r, 0) + (length - i - r - 1 if i + r >= length else 0)


def along(i: int, length: int, size: int, dilation: int) -> dict[int, int]:
    """What patch i sees on one axis, and where each stands in the table of biases."""
    alike = [j for j in range(length) if j % dilation == i % dilation]
    here = alike.index(i)
    first = starts(here, len(alike), size)
    return {alike[n]: n - here + size - 1 for n in range(first, first + size)}


def by_hand(bare: Bare, table: Tensor, grid: tuple[int, int], size: int, dilation: int) -> Tensor:
    rows, cols = grid
    out = []
    for h in range(bare.q.shape[1]):
        key, value = (x[:, h * x.shape[1] // bare.q.shape[1]] for x in (bare.k, bare.v))
        for i in range(bare.q.shape[2]):
            seen = {j: table.new_zeros(()) for j in range(key.shape[1])}
            at = i - BEFORE
            if 0 <= at < rows * cols:
                down, right = along(at // cols, rows, size, dilation), along(at % cols, cols, size, dilation)
                for y in range(rows):
                    for x in range(cols):
                        del seen[BEFORE + y * cols + x]
                        if y in down and x in right:
                            seen[BEFORE + y * cols + x] = table[h, down[y], right[x]]
                assert len(down) == len(right) == size
            keys = list(seen)
            scores = (key[:, keys] @ bare.q[:, h, i, :, None])[..., 0] * bare.shape.d**-0.5
            weights = (scores + torch.stack(list(seen.values()))).softmax(-1)
            out.append((weights[..., None] * value[:, keys]).sum(1))
    return torch.stack(out, 1).unflatten(1, bare.q.shape[1:3])


@pytest.mark.parametrize(
    ("grid", "size", "dilation"), [((5, 7), 3, 1), ((5, 6), 5, 1), ((7, 8), 3, 2), ((9, 10), 3, 3), ((6, 7), 3, 2)]
)
def test_each_patch_sees_its_neighbours_and_leans_on_their_offsets(
    grid: tuple[int, int], size: int, dilation: int
) -> None:
    n = BEFORE + grid[0] * grid[1] + 1
    bare = Bare(Shape(q=n, k=n), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)})
    draw = torch.Generator().manual_seed(size)
    table = torch.randn(4, 2 * size - 1, 2 * size - 1, generator=draw, dtype=torch.float64, requires_grad=True)
    method = NeighborhoodAttention(size, dilation)
    want = by_hand(bare, table, grid, size, dilation)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(method, backend, rows, {"bias": table})
        assert close(found, want)
    (slope,) = torch.autograd.grad(found.square().sum(), table)
    (wanted,) = torch.autograd.grad(want.square().sum(), table)
    assert close(slope, wanted)
    assert bool(wanted.any())


def test_only_columns_of_the_neighbourhood_are_computed() -> None:
    n = 32 * 32
    bare = Bare(Shape(q=n, k=n, b=1), rules=())
    call = replace(bare.call, roles={"patches": Region(((0, n),), (32, 32))})
    mask = NeighborhoodAttention(3).narrow(call.mask, call)
    assert mask.columns(call.queries.take(slice(0, 32)), call.keys, slice(0, 32)) == ((0, 96),)
    assert mask.columns(call.queries.take(slice(320, 352)), call.keys, slice(320, 352)) == ((288, 384),)


@pytest.mark.filterwarnings("ignore:this run changed nothing")
def test_a_neighbourhood_as_large_as_the_image_is_all_of_it() -> None:
    model = models.tiny("vit", image_size=12)
    inputs = models.tiny_inputs(model)
    with torch.no_grad(), attach(model, NeighborhoodAttention(3)) as run:
        for p in run.parameters():
            p.zero_()
        assert close(run(**inputs).logits, model(**inputs).logits)


def test_biases_begin_small_and_unlike() -> None:
    layer = Layer(number=1, heads=4, kv_heads=4, head_dim=8, value_dim=8, width=32)
    before = torch.get_rng_state()
    table = NeighborhoodAttention(5).parameters(layer)["bias"]
    assert torch.equal(before, torch.get_rng_state())
    assert table.shape == (4, 9, 9)
    want = torch.nn.init.trunc_normal_(torch.empty(4, 9, 9), std=0.02, generator=torch.Generator().manual_seed(1))
    assert torch.equal(table, want)
    assert not torch.equal(table, NeighborhoodAttention(5).parameters(replace(layer, number=0))["bias"])


@pytest.mark.parametrize(
    ("size", "dilation", "side"), [(5, 1, (4, 9)), (5, 1, (9, 4)), (3, 3, (8, 9)), (3, 3, (9, 8)), (3, 1, (3, 3, 3))]
)
def test_small_grids_are_refused(size: int, dilation: int, side: tuple[int, ...]) -> None:
    bare = Bare()
    region = Region(((0, int(torch.tensor(side).prod())),), side)
    with pytest.raises(
        FieldError, match=rf"size = {size}: must fit, {dilation} apart, into both sides of the.* size=3"
    ):
        NeighborhoodAttention(size, dilation).narrow(bare.call.mask, replace(bare.call, roles={"patches": region}))


def test_fields() -> None:
    assert (NeighborhoodAttention().size, NeighborhoodAttention().dilation) == (7, 1)
    assert NeighborhoodAttention.example().size == 3
    for size in (1, 4, -3):
        with pytest.raises(FieldError, match=r"must be odd, and 3 or more"):
            NeighborhoodAttention(size)
    with pytest.raises(FieldError, match=r"dilation = 0: must be 1 or more"):
        NeighborhoodAttention(3, 0)
