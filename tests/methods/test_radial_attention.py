"""RadialAttention against the authors' masks of pairs of frames."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.regions import Region
from heedful.methods import RadialAttention

BEFORE = 2  # tokens before the video


def of_frames(i: int, j: int, size: int, block: int, decay: float, beside: float) -> Tensor:
    """The authors' mask `[size size]` of the queries of frame i and the keys of frame j."""
    if j == 0:
        return torch.ones(size, size, dtype=torch.bool)
    dist = abs(i - j)
    group = dist.bit_length()
    length = 2 ** size.bit_length() / 2**group
    if dist < 1:
        width = float(size)
    elif dist == 1:
        width = float(size // 2) if beside == 0.5 else float(size)
    else:
        width = length * decay if length * decay >= block else float(block)
    rows, cols = torch.arange(size).view(-1, 1), torch.arange(size).view(1, -1)
    mask = (cols - rows).abs() <= width
    if length < block and dist % int(block / length) != 0:
        mask = torch.zeros_like(mask)
    return mask


def video(grid: tuple[int, ...]) -> Bare:
    n = BEFORE + int(torch.tensor(grid).prod()) + 1
    bare = Bare(Shape(q=n, k=n), dtype=torch.float64, rules=())
    bare.call = replace(bare.call, roles={"patches": Region(((BEFORE, n - 1),), grid)})
    return bare


@pytest.mark.parametrize(
    ("grid", "block", "decay", "beside"),
    [
        ((5, 12), 1, 1.0, 1.0),
        ((9, 7), 4, 1.0, 0.5),
        ((12, 2, 3), 4, 0.5, 1.0),
        ((17, 4), 8, 2.0, 0.5),
        ((6, 2, 2, 4), 3, 0.25, 1.0),
        ((4, 20), 1, 0.3, 0.5),
    ],
)
def test_each_pair_of_frames_has_the_authors_band(
    grid: tuple[int, ...], block: int, decay: float, beside: float
) -> None:
    bare = video(grid)
    frames, size = grid[0], int(torch.tensor(grid[1:]).prod())
    seen = torch.ones(bare.q.shape[2], bare.k.shape[2], dtype=torch.bool)
    for i in range(frames):
        for j in range(frames):
            rows, cols = (slice(BEFORE + f * size, BEFORE + (f + 1) * size) for f in (i, j))
            seen[rows, cols] = of_frames(i, j, size, block, decay, beside)
    assert not bool(seen.all())
    k, v = (x.repeat_interleave(2, 1) for x in (bare.k, bare.v))
    scores = bare.q @ k.mT * bare.shape.d**-0.5
    want = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    for backend, rows in (("reference", None), ("tiled", 5)):
        found, _ = bare.run(RadialAttention(block, decay, beside), backend, rows)
        assert close(found, want)


def of_the_paper(i: int, j: int, k: int, other: int, size: int) -> bool:
    """Whether place k of frame i sees the other of frame j, by the paper's formula and its first frame for all."""
    apart = abs(i - j)
    fewer = 2 ** math.floor(math.log2(max(apart, 1)))
    if j == 0 or (fewer <= size and abs(k - other) + 1 <= size / fewer):
        return True
    return apart % math.ceil(fewer / size) == 0 and k == other


@pytest.mark.parametrize("grid", [(12, 4), (20, 2, 2), (9, 16), (40, 1), (3, 8)])
def test_bands_are_the_papers_and_one_wider_where_sizes_are_powers_of_two(grid: tuple[int, ...]) -> None:
    frames, size = grid[0], math.prod(grid[1:])
    bare = video(grid)
    kept = RadialAttention(block=1).narrow(bare.call.mask, bare.call).keeps(bare.call.pairs)
    assert kept is not None
    for i, j, k in product(range(frames), range(frames), range(size)):
        first, places = BEFORE + j * size, range(size)
        thin = [of_the_paper(i, j, k, other, size) for other in places]
        wide = [any(thin[max(0, at - 1) : at + 2]) for at in places]
        assert kept[0, 0, BEFORE + i * size + k, first : first + size].tolist() == wide, (i, j, k)


def test_pairs_grow_more_slowly_than_the_square() -> None:
    shares = []
    for frames in (8, 16, 32):
        bare = video((frames, 16))
        mask = RadialAttention(block=4).narrow(bare.call.mask, bare.call)
        shares.append(float(mask.keeps(bare.call.pairs).double().mean()))
    assert shares[0] > 1.2 * shares[1] > 1.44 * shares[2]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"block": 0}, r"block = 0: must be 1 or more"),
        ({"decay": 0.0}, r"decay = 0\.0: must be above 0"),
        ({"decay": float("inf")}, r"decay"),
        ({"beside": -0.1}, r"beside = -0\.1: must lie from 0 to 1"),
        ({"beside": 1.1}, r"beside = 1\.1"),
    ],
)
def test_fields(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        RadialAttention(**fields)


def test_numbers_of_the_paper() -> None:
    assert (RadialAttention().block, RadialAttention().decay, RadialAttention().beside) == (128, 1.0, 1.0)
    assert RadialAttention(beside=0.0)._widths(3, 8).tolist() == [8.0, -1.0, -1.0]
    assert RadialAttention(1, beside=0.0)._widths(2, 8).tolist() == [8.0, 0.0]
    assert RadialAttention.example() == RadialAttention(1, 0.25, 0.25)


def test_a_grid_without_time_is_refused() -> None:
    bare = video((12,))
    with pytest.raises(FieldError, match=r"patches = \(12,\): must lie on a grid of time"):
        RadialAttention().narrow(bare.call.mask, bare.call)
    call = replace(bare.call, roles={"patches": Region(((2, 6),))})
    with pytest.raises(FieldError, match="patches = None"):
        RadialAttention().narrow(call.mask, call)
