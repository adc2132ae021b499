"""Keys picked for each query: what is kept, which columns are fetched, and how often is asked."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from heedful.core.mask import Mask
from heedful.core.positions import Pairs, Positions
from heedful.engine.backends.tiled import _columns
from heedful.kit import chosen
from heedful.kit.chosen import TOGETHER, Chosen, Reached, Shown, by_block, meeting

TOTAL, ROWS = 53, 2 * TOGETHER + 9
EVERY = slice(None)


def pairs(rows: slice, cols: slice) -> Pairs:
    q, k = Positions.row(0, ROWS), Positions.row(0, TOTAL)
    return Pairs(q.take(rows), k.take(cols), 2, rows, cols)


class Picks:
    """Keys 1 and `second` of every row, in the second head one more, by its number; remembers what it was asked for."""

    def __init__(self, second: int) -> None:
        self.asked = list[slice]()
        self.table = torch.zeros(1, 2, ROWS, TOTAL, dtype=torch.bool)
        self.table[..., [1, second]] = True
        self.table[0, 1, range(ROWS), [30 + row % 23 for row in range(ROWS)]] = True

    def __call__(self, rows: slice) -> Tensor:
        self.asked.append(rows)
        return self.table[:, :, rows]


PARTS = [
    slice(2, 4), slice(0, TOGETHER), slice(TOGETHER - 3, TOGETHER + 3), slice(TOGETHER, 2 * TOGETHER),
    slice(5, ROWS), slice(ROWS - 1, ROWS), slice(3, 3), slice(0, 0), slice(None, 7), slice(4, None), EVERY,
]  # fmt: skip


@pytest.mark.parametrize("rows", PARTS, ids=str)
def test_the_rule_keeps_what_was_picked(rows: slice) -> None:
    picks = Picks(20)
    for rule in (Chosen(picks), Chosen(picks)):
        for part in (rows, slice(1, 9), rows):
            assert torch.equal(rule.keeps(pairs(part, EVERY)), picks.table[:, :, part])
            assert torch.equal(rule.keeps(pairs(part, slice(15, 22))), picks.table[:, :, part, 15:22])
    assert rule.scattered
    assert Mask((rule,)).key_ranges(Positions.row(0, ROWS), Positions.row(0, TOTAL), 2) is None


def test_columns_are_those_that_some_row_of_some_head_sees() -> None:
    assert Chosen(Picks(20)).columns(slice(22, 24)) == ((1, 2), (20, 21), (30, 31), (52, 53))
    assert Chosen(Picks(2)).columns(slice(1, 3)) == ((1, 3), (31, 33))
    assert Chosen(lambda rows: torch.zeros(1, 1, 2, TOTAL, dtype=torch.bool)).columns(slice(0, 2)) == ()
    assert Chosen(lambda rows: torch.ones(1, 1, 2, TOTAL, dtype=torch.bool)).columns(slice(0, 2)) == ((0, TOTAL),)


def test_columns_far_apart_are_fetched_without_those_between() -> None:
    cpu = torch.device("cpu")
    assert list(_columns(((1, 2), (20, 22), (50, 53)), cpu)) == [1, 20, 21, 50, 51, 52]
    assert _columns(((1, 20), (21, 30)), cpu) == slice(1, 30)
    assert _columns((), cpu) == slice(0, 1)


def test_each_row_is_picked_once_whichever_tiles_ask() -> None:
    picks = Picks(20)
    rule = Chosen(picks)
    for start in range(0, ROWS, 40):  # as tiles ask: which columns some rows see, of how many rows there is room for
        for stop in (start + TOGETHER, start + 40):
            rule.columns(slice(start, min(stop, ROWS)))
        rule.keeps(pairs(slice(start, min(start + 40, ROWS)), slice(0, TOTAL)))
    blocks = [slice(0, TOGETHER), slice(TOGETHER, 2 * TOGETHER), slice(2 * TOGETHER, 3 * TOGETHER)]
    assert picks.asked == blocks
    rule.columns(slice(ROWS - 2, ROWS))
    assert picks.asked == blocks
    rule.columns(slice(0, 1))  # on the way back: of the same rows together, so that a rounding falls as it did
    assert picks.asked == [*blocks, blocks[0]]


def test_a_whole_call_is_picked_once() -> None:
    picks = Picks(20)
    rule = Chosen(picks)
    for _ in range(3):
        rule.keeps(pairs(EVERY, EVERY))
    assert picks.asked == [EVERY]


def test_groups_are_laid_out_by_key() -> None:
    group = torch.arange(TOTAL) % 5
    table = torch.rand(1, 2, ROWS, 5) < 0.2
    table[..., 3] = False
    rule = Chosen(lambda rows: table[:, :, rows], lambda picked, cols: picked[..., group[cols]])
    for rows in (slice(2, 4), slice(TOGETHER - 3, TOGETHER + 3)):
        for cols in (EVERY, slice(15, 22)):
            assert torch.equal(rule.keeps(pairs(rows, cols)), table[..., group][:, :, rows, cols])
        seen = {i for lo, hi in rule.columns(rows) for i in range(lo, hi)}
        assert seen == set(table[..., group][:, :, rows].flatten(0, 2).any(0).nonzero()[:, 0].tolist())


def test_what_rows_reach_is_asked_once_and_pairs_are_looked_at_there_alone() -> None:
    asked = list[object]()

    def pick(rows: slice, cols: slice | Tensor) -> Tensor:
        asked.append((rows, cols))
        return torch.ones(1, 1, 2, 3, dtype=torch.bool)

    def reach(rows: slice) -> Tensor:
        asked.append(rows)
        return torch.arange(TOTAL) // 3 == rows.start

    rule = Reached(pick, reach)
    assert rule.scattered
    for start in (4, 4, 6):
        assert rule.columns(slice(start, start + 2)) == ((3 * start, 3 * start + 3),)
    assert asked == [slice(4, 6), slice(6, 8)]
    assert bool(rule.keeps(pairs(slice(4, 6), slice(12, 15))).all())
    assert asked[2:] == [(slice(4, 6), slice(12, 15))]


@pytest.mark.parametrize(
    ("seen", "ranges"),
    [
        ((), ()),
        ((4, 5, 6), ((4, 7),)),
        ((2, 3, 5, 6, 8), ((2, 9),)),  # five of seven, which nobody would copy together
        ((2, 3, 5, 6, 9), ((2, 4), (5, 7), (9, 10))),  # five of eight
    ],
)
def test_hundreds_of_ranges_close_together_are_told_as_one(
    seen: tuple[int, ...], ranges: tuple[tuple[int, int], ...]
) -> None:
    table = torch.zeros(1, 1, 1, 12, dtype=torch.bool)
    table[..., list(seen)] = True
    assert Chosen(lambda rows: table).columns(slice(0, 1)) == ranges


def test_keys_of_groups_that_follow_one_another_are_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "GROUPS_TOGETHER", 200)
    table = torch.rand(1, 2, ROWS, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    asked: list[slice] = []

    def pick(rows: slice) -> Tensor:
        asked.append(rows)
        return table[:, :, rows]

    def stretches(groups: Tensor) -> Tensor:
        start = 10 * torch.arange(5).expand(groups.shape) * groups
        return torch.stack([start, (start + 10).clamp(max=TOTAL) * groups], -1)

    rule = Chosen(pick, lambda groups, cols: groups.repeat_interleave(10, -1)[..., cols], stretches)
    assert not rule.scattered
    assert Chosen(pick).scattered
    assert Chosen(pick).key_ranges(Positions.row(0, ROWS), Positions.row(0, 50)) is None
    found = rule.key_ranges(Positions.row(0, ROWS), Positions.row(0, 50))
    assert found is not None
    assert [rows.start for rows in asked] == [0, 200, 400]
    inside = (torch.arange(50) >= found[..., :1]) & (torch.arange(50) < found[..., 1:])
    assert torch.equal(inside.any(-2), table.repeat_interleave(10, -1))


@pytest.mark.parametrize(
    ("keys", "ranges"),
    [(([3, 4, 5], [3, 4, 5, 9]), 2), (([], [0]), 1), ((range(0, TOTAL, 2), [1]), None)],
)
def test_keys_shown_to_all_are_ranges_where_they_are_few(keys: tuple[list[int], list[int]], ranges: int | None) -> None:
    shown = torch.zeros(1, 2, TOTAL, dtype=torch.bool)
    for head, some in enumerate(keys):
        shown[0, head, list(some)] = True
    rule, whole = Shown(shown), Positions.row(0, TOTAL)
    found = Mask((rule,)).key_ranges(Positions.row(0, ROWS), whole, 2)
    for told in (found, rule.key_ranges(Positions.row(0, ROWS), whole)):
        assert (None if told is None else told.shape[3]) == ranges
    assert rule.scattered == (ranges is None)
    assert (
        rule.keeps(pairs(slice(2, 9), slice(4, 12)))
        .expand(1, 2, 7, 8)
        .equal(shown[:, :, None, 4:12].expand(1, 2, 7, 8))
    )
    seen = {j for lo, hi in rule.columns(slice(0, 3)) for j in range(lo, hi)}
    assert seen >= set(keys[0]) | set(keys[1])
    if found is not None:
        inside = (torch.arange(TOTAL) >= found[..., :1]) & (torch.arange(TOTAL) < found[..., 1:])
        assert inside.any(-2).equal(shown[:, :, None].expand(-1, -1, ROWS, -1))


def _flags(*rows: tuple[int, ...]) -> Tensor:
    out = torch.zeros(1, len(rows), 1, 40, dtype=torch.bool)
    for head, places in enumerate(rows):
        out[0, head, 0, list(places)] = True
    return out


def test_queries_and_keys_that_meet_are_parts() -> None:
    (part,) = meeting(_flags((3, 8, 21), (5,)), _flags((0, 8), (1, 2)))
    assert part.rows.tolist() == [[[[3, 8, 21]], [[5, 40, 40]]]]
    assert part.cols.tolist() == [[[[0, 8]], [[1, 2]]]]
    assert part.keep is None
    assert not part.shared
    (part,) = meeting(_flags((3,), (5,)), _flags((0, 8), (2,)))
    assert part.keep is not None
    assert part.keep(slice(None)).tolist() == [[[[[True, True]]], [[[True, False]]]]]
    alone = Mock(side_effect=lambda rows, cols, those: rows[..., None] + cols[..., None, :] > 3)
    (part,) = meeting(_flags((3,), (5,)), _flags((0, 8), (2,)), alone)
    assert part.shared
    assert not alone.called
    assert part.keep(slice(None)).tolist() == [[[[[False, True]]], [[[True, False]]]]]


def test_which_pairs_are_a_parts_own_is_asked_of_some_parts_at_a_time() -> None:
    made = torch.Generator().manual_seed(0)
    asking, giving = (torch.rand(2, 3, 7, 40, generator=made) < 0.1 for _ in range(2))
    numbers = torch.arange(7)[:, None, None]
    (part,) = meeting(
        asking, giving, lambda rows, cols, those: (rows[..., None] + cols[..., None, :] + numbers[those]) % 2 == 0
    )
    assert part.keep is not None
    whole = part.keep(slice(None))
    assert 0 < int(whole.sum()) < whole.numel()
    assert torch.cat([part.keep(slice(start, start + 3)) for start in (0, 3, 6)], 2).equal(whole)


@pytest.mark.parametrize(("keys", "parts"), [(20, 1), (21, 0)])
def test_nothing_is_gathered_where_parts_have_most_pairs(keys: int, parts: int) -> None:
    everyone = tuple(range(40))
    assert len(meeting(_flags(everyone), _flags(everyone[:keys]))) == parts


def test_parts_are_gathered_once_however_many_ask() -> None:
    gather = Mock(return_value=())
    rule = Reached(Mock(), Mock(), gather=gather)
    assert rule.parts() == rule.parts() == ()
    gather.assert_called_once_with()


@pytest.mark.parametrize("n", [30, 32])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_queries_of_a_past_block_lie_together(n: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair stands in one part, whether blocks have more queries than a part or none."""
    monkeypatch.setattr("heedful.kit.chosen.ROWS", 5)
    monkeypatch.setattr("heedful.kit.chosen.SPARSE", 9.0)
    picked = torch.rand(2, 3, n, 8, generator=torch.Generator().manual_seed(0)) < share
    picked[1, 2] = False  # a head without a past
    own = torch.arange(n) // 4
    want = picked.repeat_interleave(4, -1)[..., :n] & (own < own[:, None]) | (own == own[:, None]) & _past(n)
    found = torch.zeros(2, 3, n + 1, n, dtype=torch.long)
    parts = by_block(picked, 4)
    assert len(parts) == 1 + (share > 0)
    for part in parts:
        assert part.shared
        assert part.past
        rows, cols = (x.expand(2, 3, -1, -1) for x in (part.rows, part.cols))
        kept = torch.ones(2, 3, *part.rows.shape[2:], cols.shape[3]).long()
        kept = kept if part.keep is None else kept * part.keep(slice(None))
        at = rows[..., None] * n + cols[..., None, :]
        found.view(2, 3, -1).scatter_add_(-1, at.flatten(2), kept.flatten(2))
    assert found[..., :n, :].equal(want.long())


def _past(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_blocks_are_gathered_where_they_are_less_than_half_of_the_past() -> None:
    assert len(by_block(torch.eye(4).bool().repeat_interleave(4, 0)[None, None], 4)) == 1
    assert by_block(torch.eye(3).bool().repeat_interleave(4, 0)[None, None], 4) == ()
