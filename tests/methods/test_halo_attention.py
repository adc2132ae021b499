"""HaloAttention against blocks and halos in loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful.authoring import Layer
from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, SiteError
from heedful.core.regions import Region
from heedful.methods import GeneralizedNeighborhoodAttention, HaloAttention
from tests.images_by_hand import learns_of_an_image

BEFORE = 2  # tokens before the patches
CASES = [((4, 6), 2, 1), ((4, 6), 2, 0), ((5, 7), 3, 2), ((3, 4), 1, 1), ((4, 4), 8, 3)]


def _bare(grid: tuple[int, int]) -> Bare:
    n = BEFORE + grid[0] * grid[1] + 1
    bare = Bare(Shape(q=n, k=n, dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)})
    return bare


def _tables(block: int, halo: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(block)
    many = 2 * (block + halo) - 1
    return {name: torch.randn(many, 8, generator=draw, dtype=torch.float64) for name in ("rows", "columns")}


def _by_hand(bare: Bare, p: dict[str, Tensor], grid: tuple[int, int], block: int, halo: int) -> Tensor:
    s, (high, wide) = bare.shape, grid
    place = {BEFORE + y * wide + x: (y, x) for y in range(high) for x in range(wide)}
    window: dict[tuple[int, int], list[int]] = {}  # the tokens that each block sees: its patches and a frame of them
    for top in range(0, high, block):
        for left in range(0, wide, block):
            window[top, left] = [
                j
                for j, (y, x) in place.items()
                if top - halo <= y <= top + block - 1 + halo and left - halo <= x <= left + block - 1 + halo
            ]
    others = [i for i in range(s.q) if i not in place]
    out = torch.zeros(s.b, s.h, s.q, s.dv, dtype=torch.float64)
    for b in range(s.b):
        for h in range(s.h):
            q, k, v = bare.q[b, h], bare.k[b, h // 2], bare.v[b, h // 2]
            for i in range(s.q):
                if i in place:
                    y, x = place[i]
                    seen = window[y - y % block, x - x % block] + others
                else:
                    seen = list(range(s.q))
                scores = []
                for j in seen:
                    key = k[j]
                    if i in place and j in place:
                        down, right = place[j][0] - y, place[j][1] - x
                        key = key + p["rows"][down + block + halo - 1] + p["columns"][right + block + halo - 1]
                    scores.append(q[i] @ key / 8**0.5)
                out[b, h, i] = torch.stack(scores).softmax(0) @ v[seen]
    return out


@pytest.mark.parametrize(("grid", "block", "halo"), CASES)
def test_a_block_sees_itself_and_its_halo(grid: tuple[int, int], block: int, halo: int) -> None:
    bare, tables = _bare(grid), _tables(block, halo)
    want = _by_hand(bare, tables, grid, block, halo)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(HaloAttention(block, halo), backend, rows, tables)
        assert close(found, want)


def test_the_first_steps_loss_and_gradient_are_those_of_the_loops() -> None:
    bare, tables = _bare((4, 5)), _tables(2, 1)
    leaves = [*tables.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)
    heads = bare.run(HaloAttention(2, 1), "tiled", 7, tables)[0]
    losses = [(x - 1).square().mean() for x in (heads, _by_hand(bare, tables, (4, 5), 2, 1))]
    assert close(losses[0], losses[1])
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert bool(other.any())
        assert close(one, other)


def test_without_a_halo_and_offsets_blocks_are_windows_side_by_side() -> None:
    bare = _bare((4, 6))
    tables = {name: torch.zeros(3, 8, dtype=torch.float64) for name in ("rows", "columns")}
    found, _ = bare.run(HaloAttention(2, 0), "reference", params=tables)
    wanted, _ = bare.run(GeneralizedNeighborhoodAttention((2, 2), (2, 2)), "reference")
    assert close(found, wanted)


def test_only_columns_of_the_window_are_computed() -> None:
    n = 32 * 32
    bare = Bare(Shape(q=n, k=n, b=1), rules=())
    call = replace(bare.call, roles={"patches": Region(((0, n),), (32, 32))})
    mask = HaloAttention(8, 3).narrow(call.mask, call)
    assert mask.columns(call.queries.take(slice(0, 32)), call.keys, slice(0, 32)) == ((0, 11 * 32),)
    assert mask.columns(call.queries.take(slice(512, 544)), call.keys, slice(512, 544)) == ((13 * 32, 27 * 32),)


def test_an_image_model_is_served_and_learns() -> None:
    learns_of_an_image(HaloAttention.example())


def test_the_start() -> None:
    layer = Layer(number=1, heads=4, kv_heads=2, head_dim=256, value_dim=8, width=32)
    before = torch.get_rng_state()
    found = HaloAttention(2, 1).parameters(layer)
    assert torch.equal(before, torch.get_rng_state())
    assert {name: x.shape for name, x in found.items()} == {"rows": (5, 256), "columns": (5, 256)}
    draw = torch.Generator().manual_seed(1)
    for name in ("rows", "columns"):
        assert torch.equal(found[name], torch.randn(5, 256, generator=draw) / 16)


def test_what_cannot_be() -> None:
    with pytest.raises(FieldError, match=r"block = 0: must be 1 or more"):
        HaloAttention(0)
    with pytest.raises(FieldError, match=r"halo = -1: must be 0 or more"):
        HaloAttention(2, -1)
    assert HaloAttention() == HaloAttention(8, 3)
    assert HaloAttention.example() == HaloAttention(2, 1)
    bare = _bare((4, 6))
    line = replace(bare.call, roles={"patches": Region(((2, 26),), (2, 3, 4))})
    with pytest.raises(SiteError, match=r"blocks are of rows and columns, and patches lie on \(2, 3, 4\)"):
        HaloAttention(2).narrow(line.mask, line)
    with pytest.raises(SiteError, match="offsets are for queries, and it is handed none"):
        HaloAttention(2).lean(bare.call)
