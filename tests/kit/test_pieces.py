"""Pieces of a text: their sums, laid out by position, and where one does not go on from the last."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.call import Call
from heedful.core.positions import Positions
from heedful.kit.pieces import added


def piece(like: Call, start: int, n: int) -> Call:
    return replace(like, queries=Positions.row(start, n))


def row(*x: float) -> Tensor:
    return torch.tensor([x])


def test_pieces_add_up_whichever_is_longer() -> None:
    call = Bare(Shape(b=1)).call
    assert added(piece(call, 0, 3), "a", x=row(1, 2, 3)) is not None
    second = added(piece(call, 3, 2), "a", x=row(0, 0, 1, 4, 5))
    third = added(piece(call, 5, 1), "a", x=row(1, 1))
    assert second is not None
    assert third is not None
    assert [x.tolist() for part in second for x in part.values()] == [[[1, 2, 3, 0, 0]], [[1, 2, 4, 4, 5]]]
    assert [x.tolist() for part in third for x in part.values()] == [[[1, 2, 4, 4, 5]], [[2, 3, 4, 4, 5]]]


def test_a_piece_goes_on_where_the_last_one_ended_or_is_none() -> None:
    call = Bare(Shape(b=1)).call
    assert added(piece(call, 4, 2), "a", x=row(1)) is None
    assert added(piece(call, 0, 4), "a", x=row(1)) == (None, {"x": row(1)})
    assert added(piece(call, 5, 1), "a", x=row(1)) is None
    assert added(piece(call, 4, 1), "b", x=row(1)) is None
    assert added(piece(call, 4, 1), "a", x=row(1)) is not None


def test_a_piece_that_goes_on_from_some_texts_alone_is_none() -> None:
    call = Bare(Shape(b=2)).call
    x = torch.ones(2, 1)
    assert added(piece(call, 0, 4), "a", x=x) is not None
    call.state.cache["a: end"] = torch.tensor([4, 3])
    assert added(piece(call, 4, 1), "a", x=x) is None
