"""Positions: what a row of places tells without a look at a tensor, what is taken of it, and where tokens are laid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heedful.core.positions import Positions, spread_heads, taken


def test_what_differs_by_key_head_is_spread_over_query_heads() -> None:
    x = torch.arange(12).view(2, 2, 3)
    assert torch.equal(spread_heads(x, 6), x[:, [0, 0, 0, 1, 1, 1]])
    assert spread_heads(x, 2) is x
    assert spread_heads(one := x[:, :1], 6) is one


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_tokens_are_taken_in_any_order(shape: tuple[int, int]) -> None:
    x, where = torch.randn(2, 3, 7, 4), torch.randint(0, 7, (*shape, 5))
    found = taken(x, where)
    for text in range(2):
        for head in range(3):
            assert torch.equal(found[text, head], x[text, head, where.expand(2, 3, -1)[text, head]])


def test_places_of_a_row() -> None:
    plain = Positions.row(2, 4)
    assert (len(plain), plain.first, plain.pads, plain.end) == (4, 2, (0, 0), 6)
    assert plain.index.tolist() == [[[2, 3, 4, 5]]]
    assert plain.position is plain.index
    padded = Positions.row(2, 4, pad=torch.tensor([1, 3]))
    assert (padded.first, padded.pads, padded.end) == (2, (1, 3), 6)
    assert padded.position.tolist() == [[[1, 2, 3, 4]], [[-1, 0, 1, 2]]]
    assert Positions.row(0, 1).single
    assert not Positions.row(0, 2, pad=torch.tensor([0])).single


def test_where_the_first_is_not_known_the_end_is_looked_for_or_told() -> None:
    index = torch.tensor([[[4, 0, 7]]])
    assert Positions(index, index).end == 8
    assert Positions(index, index, last=11).end == 12


def test_every_place_is_known_to_be_of_a_text() -> None:
    plain, index = Positions.row(0, 3), torch.arange(3).view(1, 1, 3)
    assert plain.whole
    assert Positions(index, index).whole
    assert Positions(index, index.clone(), 0, (0, 0)).whole
    assert not Positions(index, index - 1).whole
    assert not Positions.row(0, 3, pad=torch.tensor([0, 1])).whole
    assert not Positions.row(0, 3, is_filled=torch.ones(1, 1, 3, dtype=torch.bool)).whole


def test_others_are_known_to_stand_at_the_same_places() -> None:
    one, index = Positions.row(1, 3), torch.arange(1, 4).view(1, 1, 3)
    assert one.alike(one)
    assert one.alike(Positions.row(1, 3))
    unknown = Positions(index, index)
    assert unknown.alike(unknown)
    padded = Positions.row(1, 3, pad=torch.tensor([0, 1]))
    for other in (Positions.row(0, 3), Positions.row(1, 4), padded, unknown):
        assert not one.alike(other)
        assert not other.alike(one)
    assert not unknown.alike(Positions(index, index))
    assert not padded.alike(Positions.row(1, 3, pad=torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("positions", "pads", "packed"),
    [([0, 1, 2], None, False), ([0, 1, 0], None, True), ([0, 1, 0], (0, 0), False), ([3], None, False)],
)
def test_positions_that_begin_anew(positions: list[int], pads: tuple[int, int] | None, packed: bool) -> None:
    x = torch.tensor(positions).view(1, 1, -1)
    assert Positions(torch.arange(len(positions)).view(1, 1, -1), x, None, pads).packed is packed


def test_positions_that_stay_are_not_packed() -> None:
    index = torch.arange(3).view(1, 1, 3)
    assert not Positions(index, torch.tensor([[[0, 0, 1]]])).packed


def laid(positions: Tensor, x: Tensor) -> Tensor:
    """By loops: what stands at a position of each text and head."""
    out = torch.zeros(*x.shape[:2], max(0, int(positions.max())) + 1)
    for text in range(x.shape[0]):
        for head in range(x.shape[1]):
            for i in range(x.shape[2]):
                at = int(positions.expand(x.shape[0], x.shape[1], -1)[text, head, i])
                if at >= 0:
                    out[text, head, at] += x[text, head, i]
    return out


def test_something_of_places_is_laid_out_by_position() -> None:
    x = torch.randn(2, 4, 3)
    assert Positions.row(0, 3).by_position(x) is x
    for places in (Positions.row(2, 3), Positions.row(1, 3, pad=torch.tensor([0, 3]))):
        assert torch.equal(places.by_position(x), laid(places.position, x))
    index = torch.tensor([[[0, 2, 5], [1, 3, 4]]])
    by_head = Positions(index, index)
    assert torch.equal(by_head.by_position(x), laid(index.repeat_interleave(2, 1), x))
    gone = Positions(index, torch.full_like(index, -1))
    assert gone.by_position(x).tolist() == torch.zeros(2, 4, 1).tolist()


def test_places_are_taken() -> None:
    filled = torch.tensor([[[True, False, True, True]]])
    row = Positions.row(3, 4, pad=torch.tensor([1]), is_filled=filled)
    part = row.take(slice(1, 3))
    assert (part.index.tolist(), part.position.tolist(), part.first) == ([[[4, 5]]], [[[3, 4]]], 4)
    assert part.is_filled is not None
    assert part.is_filled.tolist() == [[[False, True]]]
    assert part.pads == row.pads
    assert row.take(slice(None, 2)).first == 3
    some = row.take(torch.tensor([3, 0]))
    assert (some.index.tolist(), some.first) == ([[[6, 3]]], None)
    index = torch.tensor([[[4, 0, 7]]])
    known = Positions(index, index, last=9).take(slice(0, 2))
    assert known.position is known.index
    assert (known.first, known.last) == (None, 9)
