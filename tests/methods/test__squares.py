"""Squares of a grid and the rectangles that they see: every pair that may meet once, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.regions import Region
from heedful.engine.backends import tiled
from heedful.engine.backends.parted import in_parts
from heedful.methods import LKCA, GeneralizedNeighborhoodAttention, HaloAttention, NeighborhoodAttention
from heedful.methods.mechanisms.local import _squares
from heedful.methods.mechanisms.local._neighbours import narrowed
from heedful.methods.mechanisms.local._squares import _groups, _side
from tests.kernel_calls import a_call


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever it costs, squares are gathered."""
    monkeypatch.setattr(_squares, "WORTH", 1e9)
    _side.cache_clear()
    yield
    _side.cache_clear()


def _call(grid: tuple[int, ...], before: int, behind: int) -> Call:
    many = before + int(torch.tensor(grid).prod())
    call = a_call((1, 2, 2, many + behind, many + behind, 4, 4), ())
    return replace(call, roles={"patches": Region(((before, many),), grid)})


def near(far: int) -> Any:
    return lambda axis, query, key: (query - key).abs() <= far + axis


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (2, 1)])
@pytest.mark.parametrize("grid", [(7,), (9, 5), (6, 11), (3, 4, 5)])
@pytest.mark.parametrize("sides", [(1,), (2,), (3,), (4,), (20,)])
def test_every_pair_that_may_meet_is_in_one_part(
    sides: tuple[int, ...],
    grid: tuple[int, ...],
    before: int,
    behind: int,
    cheap: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_squares, "SIDES", sides)
    call = _call(grid, before, behind)
    mask = narrowed(call.mask, call, near(1))
    kept = mask.keeps(call.pairs)
    assert kept is not None
    found, n = torch.zeros_like(kept[0, 0], dtype=torch.long), len(call.queries)
    parts = mask.rules[0].parts()
    assert len(parts) == 1 + (before + behind > 0)
    for part in parts:
        keep = part.keep and part.keep(slice(None))
        told = (x[0, 0] for x in (part.rows, part.cols, keep) if x is not None)
        for rows, cols, *keep in zip(*told, strict=True):
            for (i, row), (j, col) in product(enumerate(rows.tolist()), enumerate(cols.tolist())):
                if row < n:
                    found[row, col] += 1 if not keep else int(keep[0][i, j])
    assert found.equal(kept[0, 0].long())
    squares = parts[0].rows.shape[2]
    assert squares == torch.tensor([-(-side // sides[0]) for side in grid]).prod()


def test_the_side_is_that_which_costs_least(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = tuple((i // 6 * 6, i // 6 * 6 + 6) for i in range(48))
    windows = tuple((max(i - 3, 0), min(i + 4, 48)) for i in range(48))
    everything = tuple((0, 48) for _ in range(48))
    for ends in (blocks, windows):
        cost = {}
        for side in _squares.SIDES:
            wide = max(
                max(b for _, b in ends[at : at + side]) - min(a for a, _ in ends[at : at + side])
                for at in range(0, 48, side)
            )
            more = (-(-48 // side) * side / 48) ** 2  # places behind the last are computed too
            cost[side] = more * (wide * wide + _squares.GATHERED * (wide / side) ** 2)
        assert _side((ends, ends)) == min(cost, key=lambda side: (cost[side], side))
    assert _side((blocks, blocks)) == 6
    even = tuple((max(i - 3, 0), min(i + 4, 64)) for i in range(64))
    assert _side((even, even)) == 8  # 7 would cost less a patch, and 10 x 10 of them are more than there are
    assert _side((everything, everything)) is None
    assert _side((blocks[:6], blocks[:6])) is None
    assert _groups(windows[:5], 2) == [(0, 5), (0, 7), (1, 8)]


def test_where_patches_are_missing_or_stand_otherwise_nothing_is_gathered(cheap: None) -> None:
    call = _call((5, 6), 1, 1)

    def parts(call: Call) -> int:
        return len(narrowed(call.mask, call, near(1)).rules[0].parts())

    assert parts(call) == 2
    for some in (slice(0, 20), slice(5, 32), torch.arange(32) % 9):
        places = call.queries.take(some)
        assert parts(replace(call, queries=places)) == 0
        assert parts(replace(call, keys=places)) == 0
    twice = call.keys.index.expand(2, -1, -1)
    assert parts(replace(call, keys=replace(call.keys, index=twice, position=twice, first=None))) == 0
    blind = narrowed(call.mask, call, lambda axis, query, key: (query >= 1 - axis) & (query == key))
    assert blind.rules[0].parts() == ()


def test_a_grid_is_cut_once_for_all_that_cut_it_so(cheap: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor | None, ...]] = []
    cut = _squares._kept

    def asked(*given: Any) -> Any:
        seen.append(found := cut(*given))
        return found

    monkeypatch.setattr(_squares, "_kept", asked)
    cut.cache_clear()
    with torch.inference_mode():
        for far, before in ((1, 0), (1, 3), (2, 0)):
            call = _call((9, 5), before, 1)
            assert len(narrowed(call.mask, call, near(far)).rules[0].parts()) == 2
    assert cut.cache_info().misses == 2
    assert seen[0] is seen[1]
    assert not any(x.is_inference() for found in seen for x in found if x is not None), "none could be learned through"


@pytest.mark.parametrize("most", [719, 720])
def test_a_large_cut_is_made_anew_and_not_kept(most: int, cheap: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty patches that see four by six places each, at squares of two."""
    monkeypatch.setattr(_squares, "SIDES", (2,))
    monkeypatch.setattr(_squares, "KEPT", most)
    _squares._kept.cache_clear()
    call = _call((5, 6), 0, 0)
    narrowed(call.mask, call, near(1)).rules[0].parts()
    assert _squares._kept.cache_info().currsize == (most == 720)


def noted(asked: list[int], *given: Any) -> Tensor:
    asked.append(1)
    return in_parts(*given)


METHODS = (
    HaloAttention(4, 1), HaloAttention(3, 2), NeighborhoodAttention(3), NeighborhoodAttention(3, 2),
    GeneralizedNeighborhoodAttention((5, 4), (2, 3)), LKCA(3),
)  # fmt: skip


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (2, 1)])
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_methods_as_the_whole_has_them_there_and_back(
    method: Any, texts: int, before: int, behind: int, cheap: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, asked = before + 16 * 20 + behind, list[int]()
    monkeypatch.setattr(tiled, "in_parts", partial(noted, asked))
    bare = Bare(Shape(q=n, k=n, b=texts, dv=6), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((before, n - behind),), (16, 20))})
    made = torch.Generator().manual_seed(0)
    fresh = method.parameters(bare.shape.layer)
    tables = {name: torch.randn(x.shape, generator=made, dtype=torch.float64) for name, x in fresh.items()}
    leaves = [*tables.values(), bare.q, bare.k, bare.v]
    for x in leaves:
        x.requires_grad_(True)

    def told(backend: str) -> tuple[Tensor, ...]:
        heads = bare.run(method, backend, params=tables)[0]
        waves = torch.arange(heads.numel(), dtype=heads.dtype).view_as(heads).sin()
        return heads, *torch.autograd.grad((heads * waves).sum(), leaves, allow_unused=True)

    for found, want in zip(told("tiled"), told("reference"), strict=True):
        assert (found is None) == (want is None)
        assert found is None or close(found, want)
    assert asked
