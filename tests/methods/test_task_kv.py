"""TaskKV against the paper's equations (12) to (17), one head and one key at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.methods.sparse.cache.task_kv import TaskKV
from heedful.tiny import tiny
from tests.samples import notes_in, within

from .test_snap_kv import SCALE, N, call_of, draw


def asked(query: Tensor, key: Tensor, value: Tensor, pad: Tensor | None = None, layer: int = 0, depth: int = 1) -> Any:
    entries, call = call_of(query, key, pad)
    call = Call(layer, depth, "layer", call.heads, call.kv_heads, call.queries, call.keys, SCALE, query=query)
    return CachedKV(key, value, entries.positions, N), call


def weights_of(heads: Tensor, key: Tensor, window: int, start: int) -> list[float]:
    """C: the mean weight that a group's last queries give to each token of a text that begins at start."""
    rows = range(max(N - window, start), N)
    got = [0.0] * N
    for head in heads:
        for i in rows:
            row = [math.exp(float(head[i] @ key[j]) * SCALE) for j in range(start, i + 1)]
            for j in range(start, i + 1):
                got[j] += row[j - start] / sum(row) / len(heads) / len(rows)
    return got


def best(score: list[float], places: list[int], count: int) -> list[int]:
    return sorted(places, key=lambda j: (-score[j], j))[:count]


def apart(c: list[list[float]], value: Tensor, method: TaskKV, far: int, start: int) -> set[int]:
    about = []
    for head, row in enumerate(c):
        chosen = best(row, list(range(start, N)), method.top)
        about.append([sum(row[j] * float(value[head, j, e]) for j in chosen) for e in range(value.shape[-1])])
    centre = [sum(v[e] for v in about) / len(about) for e in range(value.shape[-1])]
    away = [math.dist(v, centre) for v in about]
    order = sorted(range(len(away)), key=lambda i: -away[i])
    return set(order[:far]) | set(order[far:][max(len(order) - far - method.nearest, 0) :])


def by_hand(query: Tensor, key: Tensor, value: Tensor, method: TaskKV, far: int, start: int = 0) -> list[list[int]]:
    """What each key head of one text keeps: `query [h n d]`, `key` and `value [g n d]`."""
    g, tokens = len(key), N - start
    groups = query.unflatten(0, (g, -1))
    c = [weights_of(groups[i], key[i], method.window, start) for i in range(g)]
    whole = apart(c, value, method, far, start)
    kept = []
    for i in range(g):
        if i in whole:
            kept.append(list(range(start, N)))
            continue
        budget = g * math.ceil(method.budget * tokens)
        k = (budget - tokens * len(whole)) // (g - len(whole)) - method.sinks - method.recent
        edges = [j for j in range(start, N) if j - start < method.sinks or N - j <= method.recent]
        middle = [j for j in range(start, N) if j not in edges]
        before = [c[i][j] if start <= j < N - method.recent else 0.0 for j in range(N)]
        half = method.kernel // 2
        pooled = [sum(before[max(j - half, 0) : j + half + 1]) for j in range(N)]
        kept.append(sorted(edges + best(pooled, middle, max(k, 0))))
    return kept


def lists(kept: Tensor) -> list[list[list[int]]]:
    return [[row.nonzero().flatten().tolist() for row in text] for text in kept]


@pytest.mark.parametrize(("share", "nearest", "far"), [(0.25, 0, 1), (0.25, 1, 1), (0.5, 0, 2), (0.5, 1, 2)])
@pytest.mark.parametrize(("budget", "top"), [(0.75, 4), (0.8, 99), (0.2, 1)])
def test_the_papers_equations(share: float, nearest: int, far: int, budget: float, top: int) -> None:
    method = TaskKV(budget, 3, 3, sinks=2, recent=4, top=top, share=share, deepest=0, nearest=nearest)
    query, key, value, pad = draw(8, 0), draw(4, 1), draw(4, 5), torch.tensor([0, 3])
    kept = method.allot(*asked(query, key, value, pad, 0, 2))
    want = [by_hand(query[b], key[b], value[b], method, far, int(pad[b])) for b in range(2)]
    assert lists(kept) == want
    assert all(len({len(row) for row in text}) == 2 for text in want)


@pytest.mark.parametrize(("share", "deepest"), [(0.5, 1), (0.25, 3), (1.0, 0), (0.3, 9)])
def test_far_heads_change_evenly_from_the_first_layer_to_the_last(share: float, deepest: int) -> None:
    method = TaskKV(0.5, share=share, deepest=deepest)
    for depth in (2, 5):
        for layer in range(depth):
            _, call = asked(draw(8, 0), draw(4, 1), draw(4, 2), None, layer, depth)
            exact = 4 * share - (4 * share - deepest) / (depth - 1) * layer
            assert abs(method.far_heads(call) - exact) <= 0.5
            assert method.far_heads(within(call, layer, depth)) == method.far_heads(call)
    assert TaskKV(share=share).far_heads(asked(draw(8, 0), draw(4, 1), draw(4, 2))[1]) == round(4 * share)


@pytest.mark.parametrize(("share", "nearest"), [(1.0, 0), (0.5, 2), (0.0, 4), (0.0, 9), (1.0, 3)])
def test_where_all_heads_are_whole_all_stays(share: float, nearest: int) -> None:
    method = TaskKV(0.2, 3, 3, sinks=1, recent=2, share=share, deepest=0, nearest=nearest)
    assert method.allot(*asked(draw(8, 0), draw(4, 1), draw(4, 2))).all()


def test_more_far_heads_than_there_are_is_all_of_them() -> None:
    method = TaskKV(0.2, 3, 3, sinks=1, recent=2, share=0.0, deepest=9, nearest=0)
    assert method.allot(*asked(draw(8, 0), draw(4, 1), draw(4, 2), None, 1, 2)).all()


def test_the_budget_holds_where_the_whole_heads_leave_room() -> None:
    method = TaskKV(0.6, 3, 3, sinks=1, recent=2, share=0.25, nearest=1)
    kept = method.allot(*asked(draw(8, 0), draw(4, 1), draw(4, 2)))
    assert 4 * 9 - 2 < int(kept[0].sum()) <= 4 * 9


@torch.no_grad()
def test_heads_are_told_apart_once() -> None:
    """The second text begins in the second call, which tells its heads apart and leaves the first's as they were."""
    model, ids = tiny("llama", num_hidden_layers=1, num_key_value_heads=4), torch.arange(3, 67).view(2, 32)
    method = TaskKV(0.7, 2, 3, sinks=1, recent=2, top=4, share=0.25, deepest=1, nearest=0)
    text = torch.ones(2, 32, dtype=torch.long)
    text[1, :16] = 0
    whole = []
    with attach(model, method) as run:
        cache = None
        for start, stop in ((0, 16), (16, 30), (30, 31), (31, 32)):
            out = run(input_ids=ids[:, start:stop], attention_mask=text[:, :stop], **{CACHE: cache})
            cache = out[CACHE]
            whole.append(notes_in(cache)["whole"].clone())
        counts = torch.tensor(cache.layers[0].counts).view(2, 4)
    with attach(model, method) as run:
        alone = notes_in(run(input_ids=ids[1:, 16:30])[CACHE])["whole"]
    assert torch.equal(whole[0][0], whole[3][0])
    assert torch.equal(whole[1][1], alone[0])
    assert not torch.equal(whole[0][1], alone[0]), "before it began there was nothing to tell its heads by"
    assert torch.equal(whole[1], whole[2])
    assert torch.equal(whole[1], whole[3])
    assert whole[3].sum(-1).tolist() == [1, 1]
    assert counts[whole[3]].tolist() == [32, 16]
    assert counts[~whole[3]].tolist() == [(4 * 23 - 32) // 3] * 3 + [(4 * 12 - 16) // 3] * 3


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"sinks": -1}, r"TaskKV\.sinks"),
        ({"recent": 0}, r"TaskKV\.recent"),
        ({"top": 0}, r"TaskKV\.top"),
        ({"deepest": -1}, r"TaskKV\.deepest"),
        ({"nearest": -1}, r"TaskKV\.nearest"),
        ({"share": 1.1}, r"TaskKV\.share"),
        ({"share": -0.1}, r"TaskKV\.share"),
        ({"window": 0}, r"TaskKV\.window"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        TaskKV(**settings)


def test_nothing_is_declared() -> None:
    assert TaskKV().declares(90) == {}
