"""CoarseToFineAttention: both levels in loops, sparsemax by bisection, on a text's stretches and a picture's cells."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.regions import Region
from heedful.methods.mechanisms.normalise.coarse_to_fine_attention import CoarseToFineAttention, sparsemax

N = 19
PADDED = torch.arange(N)[None] >= torch.tensor([[0], [5]])
GRIDS: dict[str, Any] = {
    "stretches": None,
    "square": Region(((3, 19),), (4, 4)),
    "wide": Region(((1, 4), (5, 17)), (3, 5)),  # no multiple of a cell
    "frames": Region(((3, 19),), (4, 2, 2)),  # no picture: stretches
}


def cell_of(j: int, side: int, region: Region | None) -> tuple[int, ...]:
    if region is None or region.grid is None or len(region.grid) != 2:
        return (j // side,)
    places = [p for start, stop in region for p in range(start, stop)]
    if j not in places:
        return (0, 0, j)  # alone
    row, col = divmod(places.index(j), region.grid[1])
    return row // side, col // side


def projected(z: list[float]) -> list[float]:
    """Sparsemax: the threshold that leaves 1 in all, found by halving."""
    low, high = min(z) - 1, max(z)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(0.0, x - middle) for x in z) > 1:
            low = middle
        else:
            high = middle
    return [max(0.0, x - low) for x in z]


def row(scores: Tensor, cells: list[tuple[int, ...]]) -> Tensor:
    """The weights of a query on the keys that it sees."""
    names = sorted(set(cells), key=str)
    means = [sum(float(s) for s, c in zip(scores, cells, strict=True) if c == n) / cells.count(n) for n in names]
    of_cell = dict(zip(names, projected(means), strict=True))
    out = []
    for s, c in zip(scores, cells, strict=True):
        inside = sum(math.exp(float(other - s)) for other, d in zip(scores, cells, strict=True) if d == c)
        out.append(of_cell[c] / inside)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("text", [None, PADDED], ids=["plain", "padded"])
def test_both_levels(backend: str, grid: str, text: Tensor | None) -> None:
    bare, region = Bare(text=text), GRIDS[grid]
    bare.call = replace(bare.call, roles={} if region is None else {"patches": region})
    method, zeros = CoarseToFineAttention(2), 0
    heads, _ = bare.run(method, backend, tile_rows=7 if backend == "tiled" else None)
    for b, pad in enumerate((0, 0 if text is None else 5)):
        for h in range(4):
            q, k, v = bare.q[b, h, pad:].double(), bare.k[b, h // 2, pad:].double(), bare.v[b, h // 2, pad:].double()
            for i in range(N - pad):
                seen = range(i + 1)
                weights = row(q[i] @ k[: i + 1].T / math.sqrt(8), [cell_of(j, 2, region) for j in seen])
                zeros += int((weights == 0).sum())
                assert close(heads[b, h, pad + i], (weights @ v[: i + 1]).float()), (b, h, i)
    assert zeros > 100  # most cells have no weight


def test_weights_of_skipped_cells_are_exactly_zero_and_all_add_up_to_one() -> None:
    scores = 3 * torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(0))
    call = replace(Bare().call, keep=None, roles={})
    found = CoarseToFineAttention(3).weigh(scores, call)
    assert close(found.sum(-1), torch.ones(2, 4, N))
    by_cell = torch.nn.functional.pad(found, (0, 2)).unflatten(-1, (-1, 3))
    none = by_cell.eq(0).all(-1)
    assert none.any()
    moved = scores.clone()
    moved[..., : 3 * (N // 3)].unflatten(-1, (-1, 3))[none[..., :-1]] -= torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(CoarseToFineAttention(3).weigh(moved, call), found)  # what lies there does not count


def test_one_cell_is_a_softmax_and_cells_of_one_are_a_sparsemax() -> None:
    scores = torch.randn(2, 4, N, N, generator=torch.Generator().manual_seed(1))
    call = replace(Bare().call, keep=None, roles={})
    assert close(CoarseToFineAttention(N).weigh(scores, call), scores.softmax(-1))
    wanted = torch.tensor([projected(x.tolist()) for x in scores.flatten(0, -2).double()]).view_as(scores)
    assert close(CoarseToFineAttention(1).weigh(scores, call), wanted.float())


def test_a_cells_softmax_holds_however_far_the_rest_is() -> None:
    """Of a cell whose mean is the highest, though one score elsewhere is far above all of its own."""
    scores = torch.tensor([6.0, 5.0, 120.0, -120.0]).view(1, 1, 1, 4)
    call = replace(Bare().call, heads=1, keep=None, roles={}, keys=Bare().call.keys.take(slice(0, 4)))
    found = CoarseToFineAttention(2).weigh(scores, call)[0, 0, 0]
    share = 1 / (1 + math.exp(-1))
    assert close(found, torch.tensor([share, 1 - share, 0.0, 0.0]))


def test_sparsemax_of_some_entries_and_its_gradient() -> None:
    x = torch.tensor([[0.3, 5.0, 0.1, -0.4, -3.0], [9.0, 9.0, 9.0, 9.0, 9.0]], dtype=torch.float64).requires_grad_()
    among = torch.tensor([[True, False, True, True, True], [False] * 5])
    found = sparsemax(x, among)
    wanted = projected([0.3, 0.1, -0.4, -3.0])
    assert close(found[0], torch.tensor([wanted[0], 0.0, *wanted[1:]], dtype=torch.float64))
    assert bool(found[1].isfinite().all())
    found[0, 0].backward()
    assert x.grad is not None
    left = sum(w > 0 for w in wanted)  # what is left moves against the mean of what is left
    expected = [1 - 1 / left, 0.0, *(-1 / left if w > 0 else 0.0 for w in wanted[1:])]
    assert close(x.grad[0], torch.tensor(expected, dtype=torch.float64))


def test_settings() -> None:
    assert CoarseToFineAttention() == CoarseToFineAttention(4)
    assert CoarseToFineAttention.example() == CoarseToFineAttention(3)
    assert CoarseToFineAttention(1).side == 1
    with pytest.raises(FieldError, match=r"CoarseToFineAttention\.side = 0: must be 1 or more"):
        CoarseToFineAttention(0)
