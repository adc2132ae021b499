"""The k best of a text are the same whatever padding stands beside it."""

from __future__ import annotations

import math

import pytest
import torch

from heedful.kit.budget import rooms
from heedful.kit.topk import TOGETHER, place_of, top_k

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
