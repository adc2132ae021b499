"""What is said of tokens as they are read, asked by key."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from heedful.conformance.bare import Bare
from heedful.core.errors import SiteError
from heedful.core.positions import Positions
from heedful.core.state import Key, Notes, Shelf, State
from heedful.kit.told import at_places, of_keys, of_text

SAID = torch.arange(2 * 4 * 9 * 3).view(2, 4, 9, 3).double()


def _asked(state: State, first: int, stop: int, keys: Positions | None = None) -> torch.Tensor:
    places = Positions.row(0, stop) if keys is None else keys
    call = replace(Bare().call, queries=Positions.row(first, stop - first), keys=places, state=state)
    return of_keys(call, "said", SAID[:, :, first:stop])


def test_call_after_call_and_after_a_crop() -> None:
    shelf = Shelf()
    state = State(cache=Notes(shelf, Key(("x",), "x", "x"), 2))
    assert torch.equal(_asked(state, 0, 5), SAID[:, :, :5])
    assert torch.equal(_asked(state, 5, 9), SAID)
    shelf.crop(7)
    assert torch.equal(state.cache["said"], SAID[:, :, :7])
    assert torch.equal(_asked(state, 7, 9), SAID)


def test_what_is_read_again_is_said_anew() -> None:
    """Where nobody cut back what was said of later tokens."""
    state = State()
    _asked(state, 0, 9)
    assert torch.equal(_asked(state, 6, 8), SAID[:, :, :8])


def test_of_tokens_read_without_it_nothing_is_known() -> None:
    found = _asked(State(), 6, 9)
    assert torch.equal(found[:, :, 6:], SAID[:, :, 6:])
    assert bool(found[:, :, :6].isneginf().all())


def test_keys_are_found_by_their_index() -> None:
    """By key head, of a cache that dropped some; and one that has room left over."""
    index = torch.tensor([[0, 3, 8], [1, 2, 8]])[None].expand(2, -1, -1)
    found = _asked(State(), 0, 9, Positions(index, index))
    for h in range(4):
        assert torch.equal(found[:, h], SAID[:, h, index[0, h // 2]])
    call = replace(Bare().call, queries=Positions.row(0, 9), keys=Positions(index, index))
    of_groups = of_keys(call, "said", SAID[:, :2])
    for g in range(2):
        assert torch.equal(of_groups[:, g], SAID[:, g, index[0, g]])
    roomy = _asked(State(), 0, 9, Positions.row(0, 12))
    assert torch.equal(roomy[:, :, :9], SAID)


def test_keys_of_another_sequence_are_refused() -> None:
    with pytest.raises(SiteError, match="these are of another sequence"):
        of_keys(replace(Bare().call, cross=True), "said", SAID)


def test_of_a_text_it_is_told_by_index_whatever_keys_are_left() -> None:
    index = torch.tensor([[0, 3, 8], [1, 2, 8]])[None].expand(2, -1, -1)
    state = State()
    for first, stop, keys in ((2, 6, Positions.row(0, 6)), (6, 9, Positions(index, index))):
        call = replace(Bare().call, queries=Positions.row(first, stop - first), keys=keys, state=state)
        found = of_text(call, "said", SAID[:, :, first:stop])
    assert torch.equal(found[:, :, 2:], SAID[:, :, 2:])
    assert bool(found[:, :, :2].isneginf().all())
    assert torch.equal(found, state.cache["said"])


def test_what_is_said_of_tokens_is_found_at_places() -> None:
    index = torch.tensor([[0, 3, 8], [1, 2, 12]])[None]
    said = SAID[:, 0, :, 0]
    found = at_places(said, Positions(index, index))
    for row in range(2):
        for g in range(2):
            assert found[row, g].tolist() == [float(said[row, min(int(i), 8)]) for i in index[0, g]]
    assert torch.equal(at_places(said, Positions.row(2, 4))[:, 0], said[:, 2:6])
