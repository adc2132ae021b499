"""ThinK against the paper's score, one channel at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close_model
from heedful.core.call import CachedKV, Call, Kept
from heedful.core.errors import FieldError
from heedful.core.packed import Packing
from heedful.core.positions import Positions
from heedful.core.state import State
from heedful.methods.sparse.cache.think import ThinK
from heedful.tiny import tiny

N, D = 12, 10


def draw(heads: int, seed: int, n: int = N) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, n, D, generator=draw) * (0.2 + torch.rand(2, heads, 1, D, generator=draw))


def call_of(query: Tensor, key: Tensor, pad: Tensor | None = None, start: int = 0) -> tuple[CachedKV, Call]:
    n = start + query.shape[2]
    keys, queries = Positions.row(0, n, pad=pad), Positions.row(start, query.shape[2], pad=pad)
    text = Positions(queries.index, queries.position, 0, None, queries.position >= 0)
    call = Call(0, 1, "layer", query.shape[1], key.shape[1], text, keys, 0.5, query=query, state=State(), batch=2)
    return CachedKV(key, key, keys, query.shape[2]), call


def written(left: Kept, given: Tensor) -> Tensor:
    assert isinstance(left.key, Packing)
    return left.key.over(given)


def lightest(query: Tensor, key: Tensor, share: float, window: int) -> list[int]:
    """The channels of a key head that go, of `query [s n d]` and `key [k d]`; |Q_j K_j^T| in the Frobenius norm."""
    scores = []
    for j in range(D):
        total = 0.0
        for head in query:
            outer = torch.outer(head[-window:, j], key[:, j])
            total += float(torch.linalg.matrix_norm(outer)) ** 2
        scores.append((total, j))
    return sorted(j for _, j in sorted(scores)[: int(D * share)])


@pytest.mark.parametrize(("share", "recent", "window"), [(0.4, 3, 4), (0.55, 0, 1), (0.9, 11, 30)])
def test_the_papers_score_and_what_goes(share: float, recent: int, window: int) -> None:
    query, key, pad = draw(4, 0), draw(2, 1), torch.tensor([0, 1])
    entries, call = call_of(query, key, pad)
    left = ThinK(share, recent, window).thin(entries, call)
    assert left.keep is None
    assert left.value is None
    found = written(left, key)
    for b, start in enumerate(pad.tolist()):
        for g in range(2):
            want = key[b, g].clone()
            gone = lightest(query[b, 2 * g : 2 * g + 2, start:], key[b, g, start:], share, window)
            for i in range(start, N - recent):
                want[i, gone] = 0.0
            assert torch.equal(found[b, g], want)


def test_channels_are_chosen_once_a_text_and_later_entries_lose_the_same() -> None:
    """The second text outgrows the newest entries one call later than the first, and asks its own last query."""
    method, pad = ThinK(0.5, 9, 4), torch.tensor([0, 3])
    query, key = draw(4, 0), draw(2, 1)
    entries, call = call_of(query, key, pad)
    first = written(method.thin(entries, call), key)
    gone = [lightest(query[0, 2 * g : 2 * g + 2], key[0, g], 0.5, 4) for g in range(2)]
    assert torch.equal(first[1], key[1])
    query, more = draw(4, 2, 1), torch.cat([first, draw(2, 3, 1)], 2)
    entries, later = call_of(query, more, pad, start=N)
    second = written(method.thin(entries, replace(later, state=call.state)), more)
    for g in range(2):
        want = more[0, g].clone()
        want[: N + 1 - 9, gone[g]] = 0.0
        assert torch.equal(second[0, g], want)
        want = more[1, g].clone()
        want[3, lightest(query[1, 2 * g : 2 * g + 2], more[1, g, 3:], 0.5, 4)] = 0.0
        # the text begins at 3, and its first entry is the tenth from the end
        assert torch.equal(second[1, g, 3:], want[3:])


@torch.no_grad()
def test_what_follows_attends_without_the_dropped_channels() -> None:
    model, ids = tiny("llama", num_hidden_layers=1), torch.arange(3, 23)[None]
    plain = model(input_ids=ids)[CACHE]
    with attach(model, ThinK(0.5, 4, 6)) as run:
        cache = run(input_ids=ids)[CACHE]
        held = cache.layers[0].keys.clone()
        found = run(input_ids=ids[:, :1], **{CACHE: cache}).logits
    key = plain.layers[0].keys
    zero = held == 0
    assert torch.equal(held[~zero], key[~zero])
    assert zero[:, :, :16].float().mean() == 0.5
    assert not zero[:, :, 16:].any()
    plain.layers[0].keys = held
    assert close_model(model(input_ids=ids[:, :1], **{CACHE: plain}).logits, found)


def test_padding_asks_nothing_and_the_first_token_does() -> None:
    """Two texts of three tokens behind padding, of which all queries are asked; the loudest stand in the padding."""
    query, key = torch.full((2, 4, 5, D), 50.0), torch.ones(2, 2, 5, D)
    query[:, :, 2:] = 1.0
    query[:, :, 2] = torch.arange(1.0, D + 1)  # only the first token tells channels apart
    entries, call = call_of(query, key, torch.tensor([2, 2]))
    found = written(ThinK(0.5, 0, 5).thin(entries, call), key)
    assert not found[:, :, 2:, : D // 2].any()
    assert found[:, :, 2:, D // 2 :].all()


def test_a_short_text_is_left_as_it_is() -> None:
    told = "the newest 5 tokens keep all channels, and the text has 5: recent=2 would act"
    assert ThinK(recent=5).rests(5) == told
    assert ThinK(recent=5).rests(6) is None


@pytest.mark.parametrize("settings", [{"share": 1.0}, {"share": -0.1}, {"recent": -1}, {"window": 0}])
def test_wrong_fields_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=rf"ThinK\.{next(iter(settings))}"):
        ThinK(**settings)
