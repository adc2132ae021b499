"""TOVA against the paper's rule: of what the newest query attends to, averaged over heads, the most stays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.core.call import CachedKV, Call
from heedful.core.positions import Positions
from heedful.methods.sparse.cache.tova import TOVA
from heedful.tiny import tiny

N, SCALE = 11, 0.5


def draw(heads: int, seed: int) -> Tensor:
    return 2 * torch.randn(2, heads, N, 4, generator=torch.Generator().manual_seed(seed))


def by_hand(query: Tensor, key: Tensor, most: int, start: int = 0, cap: float = 0.0) -> list[int]:
    """What stays of a text that begins at `start`: `query [h n d]`, `key [g n d]`."""
    mean = [0.0] * N
    for h in range(len(query)):
        scores = [float(query[h, N - 1] @ key[h * len(key) // len(query), j]) * SCALE for j in range(start, N)]
        scores = [cap * math.tanh(s / cap) for s in scores] if cap else scores
        total = sum(math.exp(s) for s in scores)
        for j, s in zip(range(start, N), scores, strict=True):
            mean[j] += math.exp(s) / total / len(query)
    return sorted(sorted(range(start, N), key=lambda j: -mean[j])[:most])


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("budget", [1, 4, 0.5])
def test_the_newest_query_decides_for_all_heads(budget: int | float, cap: float) -> None:
    query, key, pad = draw(4, 0), draw(2, 1), torch.tensor([0, 3])
    places = Positions.row(0, N, pad=pad)
    text = Positions(places.index, places.position, is_filled=places.position >= 0)
    call = Call(0, 1, "layer", 4, 2, text, places, SCALE, softcap=cap or None, query=query)
    kept = TOVA(budget).omit(CachedKV(key, key, places, N), call)
    for b in range(2):
        start = int(pad[b])
        most = math.ceil(budget * (N - start)) if isinstance(budget, float) else budget
        want = by_hand(query[b], key[b], most, start, cap)
        assert [kept[b, g].nonzero().flatten().tolist() for g in range(2)] == [want, want]


@torch.no_grad()
def test_each_step_drops_what_it_looked_at_least() -> None:
    """Read off the model's own maps; the newest token has no privilege."""
    model, ids = tiny("llama", num_hidden_layers=1), torch.arange(3, 19)[None]
    held: list[int] = []
    with attach(model, TOVA(5), backend="reference") as run:
        cache, start = None, 0
        for stop in (9, 10, 11, 12, 16):
            out = run(input_ids=ids[:, start:stop], **{CACHE: cache}, output_attentions=True)
            held += range(start, stop)
            mean = out.attentions[0][0, :, -1].mean(0)
            assert len(mean) == len(held)
            held = sorted(held[i] for i in mean.argsort(descending=True)[:5].tolist())
            cache, start = out[CACHE], stop
            assert [cache.layers[0].index[0, g].tolist() for g in range(2)] == [held, held]


def test_an_eighth_is_the_default_and_what_is_declared() -> None:
    assert TOVA().declares(80) == {"kept": 10}
