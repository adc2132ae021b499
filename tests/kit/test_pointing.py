"""Pointing against loops, with keys that differ from head to head and padding that asks for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful.conformance.bare import Bare, Shape
from heedful.core.positions import Positions
from heedful.core.summary import Summary
from heedful.kit.pointing import pointing

NEEDLES, ANSWERS = ((1, 4), (5, 7)), ((8, 11), (13, 15))


def by_hand(place: torch.Tensor, columns: torch.Tensor, pads: tuple[int, ...]) -> list[float]:
    """The share for each head: `columns [b g k]` says which token of the text each column holds."""
    hits, asked = [0] * place.shape[1], 0
    for text, pad in enumerate(pads):
        for (start, stop), (first, _) in zip(NEEDLES, ANSWERS, strict=True):
            for i in range(stop - start):
                asked += 1
                for h in range(place.shape[1]):
                    column = int(place[text, h, first + i - 1 + pad])
                    hits[h] += int(columns[text, h // 2, column]) == start + i
    return [x / asked for x in hits]


@pytest.mark.parametrize("pads", [(0, 2), (0, 0)])
def test_keys_may_differ_from_head_to_head(pads: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    text = torch.arange(17) >= torch.tensor(pads)[:, None]
    bare = Bare(Shape(q=17, k=17), text=text if any(pads) else None)
    columns = torch.stack([torch.randperm(15, generator=draw) for _ in range(4)]).view(2, 2, 15)
    call = replace(bare.call, keys=Positions(columns, columns), roles={"needle": NEEDLES, "answer": ANSWERS})
    place = torch.randint(15, (2, 4, 17), generator=draw)
    for (start, _), (first, _) in zip(NEEDLES, ANSWERS, strict=True):  # so that some heads point where they should
        place[0, 1, first - 1] = (columns[0, 0] == start).nonzero()[0, 0]
        place[1, 3, first + 1] = (columns[1, 1] == start).nonzero()[0, 0]
        place[1, 3, first + 2] = (columns[1, 1] == start + 1).nonzero()[0, 0]
    found = pointing(Summary(place=place), call)
    assert found is not None
    want = by_hand(place, columns, pads)
    assert len(set(want)) > 1
    assert [round(x, 9) for x in found.value.tolist()] == [round(x, 9) for x in want]


def test_nothing_is_told_without_the_highest_places() -> None:
    assert pointing(Summary(), Bare().call) is None
