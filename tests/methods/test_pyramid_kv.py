"""PyramidKV against the authors' budgets, layer by layer, and SnapKV's votes within each."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.core.errors import FieldError
from heedful.methods.sparse.cache.pyramid_kv import PyramidKV
from heedful.tiny import tiny
from tests.samples import within

from .test_snap_kv import N, by_hand, call_of, draw


def budgets(budget: int, window: int, beta: int, depth: int, tokens: int) -> list[int]:
    """The authors' arithmetic, with steps that are not rounded."""
    least = Fraction((budget - window) // beta)
    most = (budget - window) * 2 - least
    if most >= tokens - window:
        most = Fraction(tokens - window)
        least = (budget - window) * 2 - most
    step = (most - least) / (depth - 1)
    return [math.floor(most - layer * step) + window for layer in range(depth)]


@pytest.mark.parametrize(
    ("budget", "window", "beta", "depth", "tokens"),
    [(64, 8, 20, 32, 900), (64, 8, 20, 30, 100), (13, 4, 3, 5, 40), (13, 4, 1, 4, 40), (9, 2, 4, 2, 11)],
)
def test_the_authors_budgets(budget: int, window: int, beta: int, depth: int, tokens: int) -> None:
    method = PyramidKV(budget, window, beta=beta)
    found = [method.room_in(layer, depth, tokens) for layer in range(depth)]
    assert found == budgets(budget, window, beta, depth, tokens)
    assert budget * depth - depth < sum(found) <= budget * depth
    assert (found[0] > found[-1]) is (beta > 1)


def test_where_there_is_no_pyramid() -> None:
    assert PyramidKV(8, 3).room_in(0, 1, 50) == 8, "one layer"
    assert [PyramidKV(8, 3).room_in(i, 3, 8) for i in range(3)] == [8] * 3, "room for all"
    assert [PyramidKV(8, 3).room_in(i, 3, 6) for i in range(3)] == [6] * 3, "a text that is shorter"
    assert [PyramidKV(3, 5).room_in(i, 3, 50) for i in range(3)] == [3] * 3, "room for a part of the window"
    assert [PyramidKV(0.2, 2).room_in(i, 3, 51) for i in range(3)] == [20, 11, 2], "a share"


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_votes_fill_each_layers_room(layer: int) -> None:
    method, pad = PyramidKV(7, 3, 3, beta=2), torch.tensor([0, 5])
    query, key = draw(4, 0), draw(2, 1)
    entries, call = call_of(query, key, pad)
    kept = method.snap(entries, within(call, layer, 3))
    for b, start in enumerate(pad.tolist()):
        most = budgets(7, 3, 2, 3, N - start)[layer]
        for g in range(2):
            want = by_hand(query[b, 2 * g : 2 * g + 2], key[b, g], most, method, start)
            assert kept[b, g].nonzero().flatten().tolist() == want


@torch.no_grad()
def test_layers_of_a_model_hold_what_is_theirs_while_it_goes_on() -> None:
    model, ids = tiny("llama"), torch.arange(3, 43).view(2, 20)
    with attach(model, PyramidKV(6, 2, 3)) as run:
        cache = run(input_ids=ids)[CACHE]
        held = [cache.layers[i].counts for i in range(2)]
        run(input_ids=ids[:, :1], **{CACHE: cache})
    assert held == [[10] * 4, [2] * 4]
    assert [cache.layers[i].counts for i in range(2)] == held


def test_what_is_declared_and_refused() -> None:
    assert PyramidKV().declares(90) == {}
    with pytest.raises(FieldError, match=r"PyramidKV\.beta = 0: must be 1 or more"):
        PyramidKV(beta=0)
    with pytest.raises(FieldError, match=r"PyramidKV\.window"):
        PyramidKV(window=0)
