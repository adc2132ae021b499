"""GeneralizedNeighborhoodAttention against the authors' rule in loops over one axis at a time."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.core.regions import Region
from heedful.methods import GeneralizedNeighborhoodAttention, NeighborhoodAttention

BEFORE = 2  # tokens before the patches


def along(i: int, length: int, size: int, stride: int, dilation: int) -> set[int]:
    """What patch i sees on one axis: the window of its group's leader, within the patches of its residue."""
    alike = list(range(i % dilation, length, dilation))
    leader = alike.index(i) // stride * stride + stride // 2
    leader = min(leader, len(alike) - 1)
    left, right = size // 2, size // 2 + size % 2 - 1
    middle = max(left, min(leader, len(alike) - 1 - right))
    return {alike[j] for j in range(middle - left, middle + right + 1)}


def by_hand(bare: Bare, grid: tuple[int, ...], *windows: tuple[int, ...]) -> torch.Tensor:
    places = list(product(*map(range, grid)))
    seen = torch.ones(bare.q.shape[2], bare.k.shape[2], dtype=torch.bool)
    for a, b in product(range(len(places)), repeat=2):
        sides = zip(places[a], places[b], grid, *windows, strict=True)
        seen[BEFORE + a, BEFORE + b] = all(y in along(x, *sizes) for x, y, *sizes in sides)
    share = bare.q.shape[1] // bare.k.shape[1]
    k, v = (x.repeat_interleave(share, 1) for x in (bare.k, bare.v))
    scores = bare.q @ k.mT * bare.shape.d**-0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def image(grid: tuple[int, ...]) -> Bare:
    n = BEFORE + int(torch.tensor(grid).prod()) + 1
    bare = Bare(Shape(q=n, k=n), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)})
    return bare


@pytest.mark.parametrize(
    ("grid", "size", "stride", "dilation"),
    [
        ((7, 9), (3, 4), (1, 1), (1, 1)),
        ((7, 9), (3, 4), (2, 3), (1, 1)),
        ((8, 6), (4, 2), (4, 2), (1, 1)),
        ((7, 10), (3, 5), (3, 4), (1, 2)),
        ((9, 8), (2, 2), (2, 1), (3, 4)),
        ((23,), (4,), (3,), (1,)),
        ((14,), (2,), (1,), (3,)),
        ((3, 4, 5), (2, 3, 5), (2, 1, 3), (1, 1, 1)),
        ((4, 4), (1, 4), (1, 4), (2, 1)),
    ],
)
def test_a_group_sees_the_window_of_its_middle(
    grid: tuple[int, ...], size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> None:
    bare = image(grid)
    want = by_hand(bare, grid, size, stride, dilation)
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(GeneralizedNeighborhoodAttention(size, stride, dilation), backend, rows)
        assert close(found, want)


def test_patches_of_texts_may_stand_in_other_columns() -> None:
    method, n = GeneralizedNeighborhoodAttention((3, 4), (2, 3)), BEFORE + 63
    bare = image((7, 9))
    alone = method.narrow(bare.call.mask, bare.call).keeps(bare.call.pairs)
    padded = Positions.row(0, n + 5, pad=torch.tensor([0, 3]))
    both = replace(bare.call, queries=padded, keys=padded)
    kept = method.narrow(both.mask, both).keeps(both.pairs)
    assert alone is not None
    assert kept is not None
    for text, start in enumerate((0, 3)):
        mine = slice(start, start + n)
        assert torch.equal(kept[text, 0, mine, mine], alone[0, 0, :n, :n])


def test_steps_of_one_are_neighbourhoods_and_steps_of_a_window_are_blocks() -> None:
    bare = image((6, 9))
    sliding, _ = bare.run(GeneralizedNeighborhoodAttention((3, 3)), "reference")
    table = torch.zeros(4, 5, 5, dtype=torch.float64)
    neighbours, _ = bare.run(NeighborhoodAttention(3), "reference", None, {"bias": table})
    assert close(sliding, neighbours)
    mask = GeneralizedNeighborhoodAttention((3, 3), (3, 3)).narrow(bare.call.mask, bare.call)
    places = torch.tensor(list(product(range(6), range(9)))) // 3
    seen = mask.keeps(bare.call.pairs)[0, 0, BEFORE:-1, BEFORE:-1]
    assert torch.equal(seen, (places[:, None] == places).all(-1))


def test_groups_that_fill_a_tile_share_their_columns() -> None:
    n = 32 * 32
    bare = Bare(Shape(q=n, k=n, b=1), rules=())
    call = replace(bare.call, roles={"patches": Region(((0, n),), (32, 32))})
    spans = []
    for stride in (1, 4):
        mask = GeneralizedNeighborhoodAttention((8, 32), (stride, 1)).narrow(call.mask, call)
        spans.append(mask.columns(call.queries.take(slice(512, 640)), call.keys, slice(512, 640)))
    assert spans == [((12 * 32, 23 * 32),), ((14 * 32, 22 * 32),)]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"size": ()}, r"size = \(\): must hold one or more"),
        ({"size": (0, 3)}, r"size = \(0, 3\): each must be 1 or more"),
        ({"size": (3,)}, r"stride = \(1, 1\): must have a number for each of the 1 axes"),
        ({"dilation": (1,)}, r"dilation = \(1,\): must have a number for each of the 2 axes"),
        ({"size": (3, 3), "stride": (1, 4)}, r"stride = \(1, 4\): must lie from 1 to the window's size.*\(3, 3\)"),
        ({"stride": (0, 1)}, r"stride = \(0, 1\): must lie from 1"),
        ({"dilation": (1, 0)}, r"dilation = \(1, 0\): each must be 1 or more"),
    ],
)
def test_fields(fields: dict[str, tuple[int, ...]], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        GeneralizedNeighborhoodAttention(**fields)


def test_numbers_of_the_paper() -> None:
    method = GeneralizedNeighborhoodAttention()
    assert (method.size, method.stride, method.dilation) == ((16, 16), (1, 1), (1, 1))
    assert GeneralizedNeighborhoodAttention((3, 4), (3, 4)).stride == (3, 4)
    assert GeneralizedNeighborhoodAttention.example() == GeneralizedNeighborhoodAttention((2, 3), (2, 2))


@pytest.mark.parametrize(("grid", "wide"), [((3, 9), 1), ((9, 3), 1), ((4, 4, 4), 1), ((8, 7), 2), ((7, 8), 2)])
def test_what_does_not_fit_is_refused(grid: tuple[int, ...], wide: int) -> None:
    bare = image(grid)
    with pytest.raises(FieldError, match=rf"size = \(4, 4\): must fit, {wide} apart, into both sides of the") as told:
        GeneralizedNeighborhoodAttention((4, 4), dilation=(wide, wide)).narrow(bare.call.mask, bare.call)
    assert " x ".join(map(str, grid)) + " patches of layer 0" in str(told.value)
    assert "(2, 2)" in str(told.value)
    with pytest.raises(FieldError, match=r"must fit, 1 and 2 apart, into the 3 sides"):
        GeneralizedNeighborhoodAttention((4,) * 3, (1,) * 3, (1, 2, 1)).narrow(bare.call.mask, bare.call)
