"""What patches a window lets a query see, and what goes by their offsets, pair by pair."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heedful.core.regions import Region
from heedful.methods.mechanisms.local._neighbours import Lines, _met

GRID = (4, 5)
Places = list[tuple[int, int]]
OFF = (-1, -1)
WHOLE = [(y, x) for y in range(4) for x in range(5)]


def rectangle(top: int, left: int) -> Places:
    return [(top + y, left + x) for y in range(2) for x in range(3)]


@pytest.mark.parametrize("of_keys", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("of_queries", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_table_is_asked_text_by_text_and_head_by_head(of_queries: tuple[int, int], of_keys: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    table = torch.rand(6, 6, generator=draw) > 0.5
    query, key = (
        torch.randint(2, 6, (*many, n), generator=draw) for many, n in ((of_queries, 5), (of_keys, 7))
    )  # the first two rows are nobody's
    found = _met(table, query, key)
    texts, heads = (max(pair) for pair in zip(of_queries, of_keys, strict=True))
    assert found.shape == (texts, heads, 5, 7)
    asked, held = query.expand(texts, heads, -1), key.expand(texts, heads, -1)
    for b in range(texts):
        for h in range(heads):
            for i in range(5):
                for j in range(7):
                    assert found[b, h, i, j] == table[asked[b, h, i], held[b, h, j]]


KEYS: dict[str, list[Places]] = {
    "all": [WHOLE],
    "all, and others around them": [[OFF, OFF, *WHOLE, OFF]],
    "some lines": [WHOLE[5:15]],
    "scattered": [[WHOLE[i] for i in (7, 3, 19, 4)] + [OFF]],
    "a rectangle of each text": [rectangle(0, 1), rectangle(2, 2)],
    "a rectangle of each text, and others behind it": [[*rectangle(1, 0), OFF], [*rectangle(2, 2), OFF]],
    "a rectangle of one text alone": [[*rectangle(1, 0), OFF], [*rectangle(2, 2), (0, 0)]],
    "one as wide but not as high": [rectangle(1, 0)[:5], rectangle(2, 2)[:5]],
    "lines that do not begin alike": [[(0, 0), (0, 1), (1, 1), (1, 2)], [(0, 0), (0, 1), (1, 0), (1, 1)]],
    "scattered in each text": [[OFF, (3, 1), (0, 4)], [(2, 2), OFF, (1, 0)]],
}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("keys", KEYS)
def test_what_goes_by_offsets_is_the_table_s_entry_of_each_pair(keys: str, step: int) -> None:
    held, asking = KEYS[keys], [[(3, 0), OFF, (1, 4)], [(0, 2), (2, 2), OFF]][: len(KEYS[keys])]
    table = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))
    query, key = (torch.tensor(x)[:, None] for x in (asking, held))
    call: Any = SimpleNamespace(coordinates=lambda role: (query, key), region=lambda role: Region(((0, 20),), GRID))
    lines = Lines(call)
    assert (lines._place is None) == keys.startswith("a rectangle of each text"), "these are not looked up one by one"
    found = lines.by_offset(table, step)
    wanted = torch.zeros(len(held), 2, 3, len(held[0]))
    for b, places in enumerate(held):
        for i, (y, x) in enumerate(asking[b]):
            for j, (row, column) in enumerate(places):
                if OFF not in ((y, x), (row, column)):
                    down, right = min(max((row - y) // step, -1), 1), min(max((column - x) // step, -2), 2)
                    wanted[b, :, i, j] = table[:, 1 + down, 2 + right]
    assert torch.equal(found, wanted)
