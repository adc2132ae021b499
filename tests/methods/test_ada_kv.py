"""AdaKV against the authors' allotment, counted in loops over a layer's heads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods.sparse.cache.ada_kv import AdaKV
from heedful.tiny import tiny

from .test_snap_kv import SCALE, N, call_of, draw


def pooled(query: Tensor, key: Tensor, window: int, kernel: int, start: int) -> list[float]:
    """The mean weight that a group's last queries give to each entry before the window, and its neighbours' highest."""
    first = max(N - window, start)
    votes = [0.0] * N
    for head in query:
        for i in range(first, N):
            row = [math.exp(float(head[i] @ key[j]) * SCALE) for j in range(start, i + 1)]
            for j in range(start, first):
                votes[j] += row[j - start] / sum(row) / len(query) / (N - first)
    half = kernel // 2
    return [max(votes[max(j - half, start) : min(j + half + 1, first)]) for j in range(start, first)]


def by_hand(query: Tensor, key: Tensor, most: int, window: int, kernel: int, floor: float, start: int = 0) -> list:
    """What each key head of one text keeps; `query [h n d]`, `key [g n d]`."""
    g = len(key)
    groups = query.unflatten(0, (g, -1))
    scores = [pooled(groups[i], key[i], window, kernel, start) for i in range(g)]
    even = most - window
    ranked = sorted(((-s, i, j) for i in range(g) for j, s in enumerate(scores[i])))[: g * even]
    kept = []
    for i in range(g):
        mine = sum(1 for _, head, _ in ranked if head == i)
        room = math.floor(floor * even + (1 - floor) * mine + 1e-6)
        best = sorted(range(len(scores[i])), key=lambda j: (-scores[i][j], j))[:room]
        kept.append(sorted([start + j for j in best] + list(range(max(N - window, start), N))))
    return kept


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("budget", "window", "kernel"), [(8, 3, 3), (6, 2, 1), (11, 4, 5)])
def test_the_authors_allotment(floor: float, budget: int, window: int, kernel: int) -> None:
    method = AdaKV(budget, window, kernel, floor=floor)
    query, key, pad = draw(8, 0), draw(4, 1), torch.tensor([0, 3])
    key[:, 1] *= 3  # a head that looks at few entries
    kept = method.allot(*call_of(query, key, pad))
    for b, start in enumerate(pad.tolist()):
        want = by_hand(query[b], key[b], budget, window, kernel, floor, start)
        assert [kept[b, g].nonzero().flatten().tolist() for g in range(4)] == want
    assert int(kept[0].sum()) <= 4 * budget
    assert (len(set(kept[0].sum(-1).tolist())) == 1) is (floor == 1)


def test_where_all_fits_all_stays() -> None:
    query, key = draw(4, 0), draw(2, 1)
    assert AdaKV(N, 3, 3).allot(*call_of(query, key)).all()
    assert AdaKV(0.99, 3, 3).allot(*call_of(query, key)).all()
    padded = AdaKV(9, 3, 3).allot(*call_of(query, key, torch.tensor([0, 7])))
    assert padded[1].sum(-1).tolist() == [8, 8], "a text shorter than the budget"
    assert padded[0].sum() <= 18


def test_a_budget_below_the_window_keeps_the_newest() -> None:
    kept = AdaKV(2, 5, 3).allot(*call_of(draw(2, 0), draw(2, 1)))
    assert [kept[0, g].nonzero().flatten().tolist() for g in range(2)] == [[N - 2, N - 1]] * 2


@torch.no_grad()
def test_the_layers_budget_holds_while_decoding() -> None:
    model, ids = tiny("llama"), torch.arange(3, 43).view(2, 20)
    with attach(model, AdaKV(6, 2, 3)) as run:
        cache, sums = run(input_ids=ids)[CACHE], []
        for i in range(4):
            run(input_ids=ids[:, i : i + 1], **{CACHE: cache})
            counts = torch.tensor(cache.layers[0].counts).view(2, 2)
            sums += counts.sum(-1).tolist()
            assert int(counts.min()) >= 2
    assert all(11 <= total <= 12 for total in sums)


def test_an_empty_slot_has_no_votes() -> None:
    """A head that holds fewer than others has slots that may bear any index, here that of the first token."""
    query, key = draw(2, 0), draw(2, 1)
    key[:, :, 0] += query[:, :, -3:].mean(2)  # the first token draws votes, and its neighbours with it
    entries, call = call_of(query, key)
    slot = torch.cat([torch.zeros(1, 1, 1, dtype=torch.long), entries.positions.index], -1)
    wide = Positions(slot, slot, is_filled=torch.arange(N + 1).view(1, 1, -1) > 0)
    padded = torch.nn.functional.pad(key, (0, 0, 1, 0))
    for kernel in (1, 3):
        method = AdaKV(8, 3, kernel)
        held, seen, apart = (
            CachedKV(padded, padded, wide, N),
            replace(call, keys=wide, state=State()),
            replace(call, state=State()),
        )
        found = method.pooled(held, seen, method.last(held, seen))
        assert close(found[..., 1:], method.pooled(entries, apart, method.last(entries, apart)))


def test_what_is_declared_and_refused() -> None:
    assert AdaKV().declares(90) == {}
    for floor in (-0.1, 1.1):
        with pytest.raises(FieldError, match=r"AdaKV\.floor"):
            AdaKV(floor=floor)
    with pytest.raises(FieldError, match=r"AdaKV\.window"):
        AdaKV(window=0)


def test_a_share_of_the_floor_that_float32_rounds_down_is_kept_whole() -> None:
    """The second head looks at its window alone and wins no entry; two fifths of 25 are 10."""
    n, window = 62, 2
    query, key = torch.ones(1, 2, n, 1), torch.zeros(1, 2, n, 1)
    key[0, 1, -window:] = 60.0
    places = Positions.row(0, n)
    call = Call(0, 1, "layer", 2, 2, places, places, 1.0, query=query)
    kept = AdaKV(25 + window, window, 1, floor=0.4).allot(CachedKV(key, key, places, n), call)
    assert kept[0].sum(-1).tolist() == [10 + 30 + window, 10 + window]
