"""The rules of budgets one by one, on calls without a model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful.conformance.bare import Bare, Shape
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.kit.budget import (
    added_up,
    grown,
    is_whole,
    keep_best,
    length,
    newest,
    room,
    room_for,
    rooms,
)
from heedful.methods import KNorm


def given(n: int, text: Tensor | None = None) -> tuple[CachedKV, Call]:
    bare = Bare(Shape(b=2, q=n, k=n), text=text)
    return CachedKV(bare.k, bare.v, bare.call.keys, n), bare.call


@pytest.mark.parametrize("budget", [1, 7, 0.01, 0.5, 1.0])
def test_a_budget_is_a_count_or_a_share(budget: Any) -> None:
    assert KNorm(budget).budget == budget


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.01, -0.5, True, "half", None])
def test_nothing_else_is_a_budget(budget: Any) -> None:
    with pytest.raises(FieldError, match=r"KNorm\.budget = .*; for example budget=0\.5"):
        KNorm(budget)


def test_room_in_entries_and_in_shares() -> None:
    assert [is_whole(x) for x in (1.0, 1, 0.5, 2)] == [True, False, False, False]
    assert [room_for(0.3, n) for n in (0, 1, 3, 4, 10)] == [1, 1, 1, 2, 3]
    assert [room_for(3, n) for n in (0, 2, 9)] == [3, 3, 3]
    assert rooms(0.1, torch.tensor([[10], [20], [21]])).tolist() == [[1], [2], [3]], "not what float32 makes of 0.1"
    assert rooms(5, torch.tensor([[10], [20]])).tolist() == [[5], [5]]


@pytest.mark.parametrize("left", [True, False])
def test_the_length_of_a_text_is_without_its_padding(left: bool) -> None:
    text = torch.ones(2, 9, dtype=torch.bool)
    text[1, : 4 if left else None] = left is not True
    if not left:
        text[1], text[1, :5] = False, True
    entries, call = given(9, text)
    assert length(call).flatten().tolist() == [9, 5]
    assert room(0.5, call).flatten().tolist() == [5, 3]
    found = newest(entries, call, 2).expand(2, 1, 9)
    assert found[0, 0].nonzero().flatten().tolist() == [7, 8]
    assert found[1, 0].nonzero().flatten().tolist() == ([7, 8] if left else [3, 4])
    found = newest(entries, call, torch.tensor([1, 3])[:, None, None])
    assert found.sum(-1).flatten().tolist() == [1, 3]


def test_a_call_of_padding_alone_ends_where_the_text_did() -> None:
    text = torch.tensor([[True] * 9, [True] * 3 + [False] * 6])
    _, call = given(9, text)
    late = Positions.row(5, 2, is_filled=text[:, None, 5:7])
    assert length(replace(call, queries=late)).flatten().tolist() == [7, 3]


def test_sums_are_kept_by_index() -> None:
    entries, call = given(4)
    ones = torch.ones(2, 2, 4)
    assert added_up("votes", ones, entries, call).tolist() == ones.tolist()
    later = replace(entries, positions=Positions(torch.tensor([[[0, 2, 3, 5]]]), torch.tensor([[[0, 2, 3, 5]]])))
    found = added_up("votes", 2 * ones, later, call, torch.tensor(0.5))
    assert found[0, 0].tolist() == [2.5, 2.5, 2.5, 2.0]
    assert call.state.cache["votes"][0, 0].tolist() == [2.5, 0.5, 2.5, 2.5, 0.0, 2.0]
    assert added_up("others", ones, later, call).tolist() == ones.tolist()


def test_the_best_stay_and_padding_goes_first() -> None:
    text = torch.ones(2, 6, dtype=torch.bool)
    text[1, :2] = False
    entries, _ = given(6, text)
    entries = replace(entries, in_row=text[:, None])
    score = torch.arange(6.0).flip(0).expand(2, 2, 6)
    most = torch.tensor([[2, 6]])[..., None]
    kept = keep_best(score, entries, most)
    assert kept[0].tolist() == [[True] * 2 + [False] * 4, [True] * 6]
    assert kept[1].tolist() == [[False] * 2 + [True] * 2 + [False] * 2, [False] * 2 + [True] * 4]
    assert keep_best(score, entries, torch.tensor([[[6]]])).tolist() == entries.is_filled.tolist(), "room for all"
    assert math.isclose(float(keep_best(score, entries, torch.tensor([[[5]]]))[0].sum()), 10)


def test_how_far_a_text_has_grown_is_plain_numbers_where_one_token_is_known_to_be_the_next() -> None:
    _, call = given(9)
    one = replace(call, queries=call.queries.take(slice(7, 8)))
    assert grown(one) == (7, 8)
    lost = replace(one, queries=Positions(one.queries.index, one.queries.position, None, (0, 0)))
    assert [int(x) for x in grown(lost)] == [7, 8]
    assert not any(isinstance(x, int) for x in (*grown(lost), *grown(call)))
