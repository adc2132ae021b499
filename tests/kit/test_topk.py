"""The k best of a text are the same whatever padding stands beside it."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.kit.budget import rooms
from heedful.kit.topk import TOGETHER, place_of, places_of, smallest, top_k

LENGTHS = (7, 3, 5)


def by_loop(row: list[float], k: int) -> list[bool]:
    kept = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return [i in kept for i in range(len(row))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [0, 2, 9, 0.4, 1.0, (4, 1, 6)])
def test_padding_on_either_side_is_never_counted(side: str, k: float | tuple[int, ...]) -> None:
    torch.manual_seed(0)
    texts = [torch.randint(0, 3, (2, n)).float() for n in LENGTHS]
    texts[1][0] = -torch.inf
    scores, is_text = torch.full((3, 2, 7), 99.0), torch.zeros(3, 1, 7, dtype=torch.bool)
    positions = [slice(7 - n, 7) if side == "left" else slice(0, n) for n in LENGTHS]
    for i, place in enumerate(positions):
        scores[i, :, place], is_text[i, :, place] = texts[i], True
    if isinstance(k, float):
        counts, given = [math.ceil(k * n) for n in LENGTHS], rooms(k, is_text.sum(-1, keepdim=True))
    elif isinstance(k, tuple):
        counts, given = list(k), torch.tensor(k)[:, None, None]
    else:
        counts, given = [k] * 3, k
    kept = top_k(scores, given, is_text)
    for i, (text, place) in enumerate(zip(texts, positions, strict=True)):
        assert kept[i, :, place].tolist() == [by_loop(row.tolist(), counts[i]) for row in text]
        assert kept[i].sum() == kept[i, :, place].sum()


def test_of_many_equals_the_earlier_go_first() -> None:
    """Of so few as sorting networks take, an unstable sort leaves equals in their order."""
    is_text = torch.arange(40) >= 12
    kept = top_k(torch.zeros(1, 40), 5, is_text)
    assert kept[0].nonzero()[:, 0].tolist() == [12, 13, 14, 15, 16]


@pytest.mark.parametrize("n", [1, TOGETHER - 1, TOGETHER, 3 * TOGETHER + 5])
@pytest.mark.parametrize("count", [1, 2, TOGETHER, TOGETHER + 1])
def test_the_place_of_the_last_that_counts(n: int, count: int) -> None:
    torch.manual_seed(0)
    seen = torch.rand(2, 1, 40, n) < torch.linspace(0, 1, 40)[:, None]
    for row, place in zip(seen.flatten(0, 2).tolist(), place_of(seen, count).flatten().tolist(), strict=True):
        trues = [i for i, yes in enumerate(row) if yes]
        assert place == (trues[count - 1] if len(trues) >= count else n)


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_of_a_whole_row_the_earlier_of_equals_go_first_too(k: int) -> None:
    rows = torch.randint(0, 3, (4, 20, 7), generator=torch.Generator().manual_seed(0)).float()
    rows[0, 0, 2], rows[0, 1, :3], rows[0, 2, 1:4] = math.nan, math.nan, -torch.inf
    found = top_k(rows, k, None)
    for row, kept in zip(rows.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        assert kept == by_loop([math.inf if math.isnan(x) else x for x in row], k)


def test_where_each_row_is_true() -> None:
    chosen = torch.tensor([[[0, 1, 0, 1], [0, 0, 0, 0]], [[1, 1, 1, 0], [0, 0, 0, 1]]]).bool()
    places, there = places_of(chosen)
    assert places.tolist() == [[[1, 3, 0], [0, 0, 0]], [[0, 1, 2], [3, 0, 0]]]
    assert there.sum(-1).tolist() == [[2, 0], [3, 1]]
    assert bool((there.int().diff() <= 0).all())


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_the_smallest_of_each_range_against_sorting(n: int, k: int) -> None:
    made = torch.Generator().manual_seed(n)
    rank = torch.rand(2, 3, n, generator=made).argsort(-1)
    start, stop = torch.randint(0, n + 1, (2, 3, 20, 2), generator=made).sort(-1).values.unbind(-1)
    found = smallest(rank, k, start, stop)
    for row, lo, hi, got in zip(*(x.flatten(0, 1).tolist() for x in (rank, start, stop, found)), strict=True):
        for a, b, one in zip(lo, hi, got, strict=True):
            assert one == (sorted(row[a:b])[k - 1] if b - a >= k else n)
