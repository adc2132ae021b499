"""SnapKV against the authors' steps, one head and one key at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.adapters.kvcache import cache_bytes
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.mask import Causal, Mask, Padding
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.tiny import tiny
from tests.samples import notes_in

N, SCALE = 15, 0.5


def draw(heads: int, seed: int) -> Tensor:
    return 2 * torch.randn(2, heads, N, 4, generator=torch.Generator().manual_seed(seed))


def call_of(query: Tensor, key: Tensor, pad: Tensor | None = None, **more: Any) -> tuple[CachedKV, Call]:
    positions = Positions.row(0, N, pad=pad)
    is_text = None if pad is None else positions.position >= 0
    queries = Positions(positions.index, positions.position, 0, None, is_text)
    call = Call(0, 1, "layer", query.shape[1], key.shape[1], queries, positions, SCALE, query=query, **more)
    return CachedKV(key, key, positions, N), call


def by_hand(query: Tensor, key: Tensor, most: int, method: SnapKV, start: int = 0, cap: float = 0.0) -> list[int]:
    """The entries of one key head that stay; `query [s n d]` are the query heads of its group, text begins at start."""
    first = N - method.window
    votes = [0.0] * N
    for head in query:
        for i in range(max(first, start), N):
            scores = [float(head[i] @ key[j]) * SCALE for j in range(start, i + 1)]
            scores = [cap * math.tanh(s / cap) for s in scores] if cap else scores
            total = sum(math.exp(s) for s in scores)
            for j in range(start, min(i + 1, first)):
                votes[j] += math.exp(scores[j - start]) / total
    half = method.kernel // 2
    pooled = []
    for j in range(start, first):
        near = [votes[i] if 0 <= i < first else 0.0 for i in range(j - half, j + half + 1)]
        pooled.append((max(near) if method.pool == "max" else sum(near), -j))
    best = sorted(pooled, reverse=True)[: most - method.window]
    return sorted([-j for _, j in best] + list(range(first, N)))


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize(("window", "kernel", "budget"), [(3, 3, 7), (1, 1, 4), (4, 5, 10)])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_the_authors_steps(pool: str, window: int, kernel: int, budget: int, cap: float) -> None:
    method = SnapKV(budget, window, kernel, pool)
    query, key = draw(4, 0), draw(2, 1)
    kept = method.snap(*call_of(query, key, softcap=cap or None))
    for b in range(2):
        for g in range(2):
            wanted = by_hand(query[b, 2 * g : 2 * g + 2], key[b, g], budget, method, cap=cap)
            assert kept[b, g].nonzero().flatten().tolist() == wanted


def test_padding_has_no_vote_and_gets_none() -> None:
    method = SnapKV(6, 3, 3)
    query, key = draw(4, 2), draw(2, 3)
    key[1, :, :5] *= 9
    kept = method.snap(*call_of(query, key, torch.tensor([0, 5])))
    assert kept[1, 1].nonzero().flatten().tolist() == by_hand(query[1, 2:], key[1, 1], 6, method, start=5)
    kept = method.snap(*call_of(query, key, torch.tensor([0, 13])))
    assert kept[1].sum(-1).tolist() == [2, 2]


def test_a_text_may_begin_at_a_later_position_than_its_row() -> None:
    """As where position ids begin above 0: votes are laid out by position."""
    query, key = draw(4, 0), draw(2, 1)
    entries, call = call_of(query, key)
    method = SnapKV(8, 3, 3)
    wanted = method.pooled(entries, call, method.last(entries, call))
    later = Positions(entries.positions.index, entries.positions.index + 9, 0)
    entries, call = CachedKV(key, key, later, N), replace(call, queries=later, keys=later, state=State())
    assert torch.equal(method.pooled(entries, call, method.last(entries, call)), wanted)


def test_a_budget_below_the_window_keeps_the_newest() -> None:
    kept = SnapKV(2, 5, 3).snap(*call_of(draw(2, 0), draw(2, 1)))
    assert kept[0, 0].nonzero().flatten().tolist() == [N - 2, N - 1]


def test_padding_on_the_right_has_no_vote() -> None:
    """A text that ends before its row does votes with its own last queries, as it does alone."""
    method, n = SnapKV(6, 3, 3), 11
    query, key = draw(4, 2), draw(2, 3)
    text = torch.arange(N) < torch.tensor([[N], [n]])
    positions = Positions.row(0, N)
    queries = Positions.row(0, N, is_filled=text[:, None])
    call = Call(0, 1, "layer", 4, 2, queries, positions, SCALE, query=query, mask=Mask((Causal(), Padding(text))))
    kept = method.snap(CachedKV(key, key, positions, N, in_row=text[:, None]), call)
    part = Positions.row(0, n)
    alone = Call(0, 1, "layer", 4, 2, part, part, SCALE, query=query[1:, :, :n])
    want = method.snap(CachedKV(key[1:, :, :n], key[1:, :, :n], part, n), alone)
    assert torch.equal(kept[1, :, :n], want[0])
    assert not kept[1, :, n:].any()


@torch.no_grad()
def test_later_votes_join_earlier_ones_which_fade() -> None:
    """After a prompt, single tokens and a piece as long as the window: the authors' votes, faded and added."""
    model, ids = tiny("llama", num_hidden_layers=1), torch.arange(3, 35).view(2, 16)
    window, stops = 3, (9, 10, 11, 16)
    with attach(model, SnapKV(15, window=window, kernel=3), backend="reference") as run:
        cache, want, start = None, torch.zeros(2, 2, 0), 0
        for stop in stops:
            out = run(input_ids=ids[:, start:stop], **{CACHE: cache}, output_attentions=True)
            cache, new = out[CACHE], min(window, stop - start)
            given = out.attentions[0][:, :, -new:].sum(2).unflatten(1, (2, -1)).sum(2)
            want = torch.nn.functional.pad(want * (1 - new / window), (0, stop - start)) + given
            start = stop
            assert close_model(notes_in(cache)["votes"], want)
    assert cache.layers[0].keys.shape[2] == 15


@torch.no_grad()
def test_votes_fade_by_each_texts_own_new_tokens() -> None:
    """A piece that has four tokens of one text and one of the other, which is padded on the right."""
    model, ids = tiny("llama", num_hidden_layers=1), torch.arange(3, 27).view(2, 12)
    text, votes = torch.arange(12)[None] < torch.tensor([[12], [9]]), []
    for rows, end in ((slice(0, 2), 12), (slice(1, 2), 9)):
        with attach(model, SnapKV(6, window=3, kernel=3)) as run:
            cache = run(input_ids=ids[rows, :8], attention_mask=text[rows, :8].long())[CACHE]
            run(input_ids=ids[rows, 8:end], attention_mask=text[rows, :end].long(), **{CACHE: cache})
            votes.append(notes_in(cache)["votes"][-1, :, :9])
    assert close_model(*votes)


@torch.no_grad()
def test_the_budget_holds_what_it_says() -> None:
    """Notes are part of the cache, and next to nothing of it."""
    model, ids = tiny("llama", head_dim=64), torch.arange(400).remainder(97)[None]
    with attach(model, SnapKV(0.25)) as run:
        cache = run(input_ids=ids)[CACHE]
    whole = cache_bytes(model(input_ids=ids)[CACHE])
    assert cache.layers[0].keys.shape[2] == 100
    assert 0.25 < cache_bytes(cache) / whole < 0.27  # a number for each token, an index for each entry


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"window": 0}, r"SnapKV\.window"),
        ({"kernel": 4}, r"SnapKV\.kernel = 4: must be odd"),
        ({"pool": "sum"}, r"SnapKV\.pool"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        SnapKV(**settings)


def test_no_more_than_the_text_is_declared() -> None:
    assert SnapKV(budget=70).declares(5) == {"kept": 5}
    assert SnapKV(budget=70).declares(90) == {"kept": 70}
