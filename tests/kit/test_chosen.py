"""Keys picked for each query: what is kept, which columns are fetched, and how often is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.mask import Mask
from heedful.core.positions import Pairs, Positions
from heedful.kit.chosen import Chosen

TOTAL = 53


def pairs(rows: slice, cols: slice) -> Pairs:
    q, k = Positions.row(0, 6), Positions.row(0, TOTAL)
    return Pairs(q.take(rows), k.take(cols), 2, rows, cols)


class Picks:
    """Keys 1 and `second` of every row, in the second head also the last one; remembers what it was asked for."""

    def __init__(self, second: int) -> None:
        self.second, self.asked = second, list[slice]()

    def __call__(self, rows: slice) -> Tensor:
        self.asked.append(rows)
        out = torch.zeros(1, 2, rows.stop - rows.start, TOTAL, dtype=torch.bool)
        out[..., 1] = True
        out[:, :, 0, self.second] = True
        out[:, 1, -1, TOTAL - 1] = True
        return out


def test_the_rule_keeps_what_was_picked() -> None:
    picks = Picks(20)
    rule, rows = Chosen(picks), slice(2, 4)
    whole = picks(rows)
    assert torch.equal(rule.keeps(pairs(rows, slice(0, TOTAL))), whole)
    assert torch.equal(rule.keeps(pairs(rows, slice(15, 22))), whole[..., 15:22])
    assert rule.scattered
    assert Mask((rule,)).key_ranges(Positions.row(0, 6), Positions.row(0, TOTAL), 2) is None


def test_columns_are_those_that_some_row_of_some_head_sees() -> None:
    assert Chosen(Picks(20)).columns(slice(0, 3)) == ((1, 2), (20, 21), (52, 53))
    assert Chosen(Picks(2)).columns(slice(0, 3)) == ((1, 3), (52, 53))
    assert Chosen(lambda rows: torch.zeros(1, 1, 2, TOTAL, dtype=torch.bool)).columns(slice(0, 2)) == ()
    assert Chosen(lambda rows: torch.ones(1, 1, 2, TOTAL, dtype=torch.bool)).columns(slice(0, 2)) == ((0, TOTAL),)


def test_rows_are_asked_for_once_in_a_row() -> None:
    picks = Picks(20)
    rule, first, second = Chosen(picks), slice(0, 2), slice(2, 4)
    for rows in (first, first, second, second, first):
        rule.columns(rows)
        found = rule.keeps(pairs(rows, slice(0, TOTAL)))
        assert found.shape[2] == 2
    assert picks.asked == [first, second, first]


def test_fewer_of_the_rows_just_picked_are_not_picked_again() -> None:
    picks = Picks(20)
    rule = Chosen(picks)
    whole = rule.keeps(pairs(slice(0, 4), slice(0, TOTAL)))
    for part in (slice(0, 2), slice(1, 4), slice(0, 4)):
        assert torch.equal(rule.keeps(pairs(part, slice(0, TOTAL))), whole[:, :, part])
    assert picks.asked == [slice(0, 4)]
    later = rule.keeps(pairs(slice(2, 6), slice(0, TOTAL)))
    assert torch.equal(rule.keeps(pairs(slice(3, 5), slice(0, TOTAL))), later[:, :, 1:3])
    assert picks.asked == [slice(0, 4), slice(2, 6)]
    every = slice(None)
    found = Chosen(lambda rows: whole[:, :, rows])
    assert torch.equal(found.keeps(pairs(every, every)), whole)
    assert torch.equal(found.keeps(pairs(slice(1, 3), every)), whole[:, :, 1:3])
    assert torch.equal(found.keeps(pairs(every, every)), whole)
