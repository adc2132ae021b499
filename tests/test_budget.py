"""What may stay in a cache, where texts are padded on the right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from heedful import attach
from heedful.adapters.cache_name import CACHE
from heedful.core.call import CachedKV, Call
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, keep_best, newest, room
from heedful.tiny import tiny

from .samples import PAPER

IDS = torch.arange(3, 43).view(2, 20)
TEXT = torch.arange(20)[None] < torch.tensor([20, 12])[:, None]


class Best(Method):
    """The newest two, and of the others those that stand last: what padding on the right would win."""

    paper = PAPER
    budget: Budget = 6

    @at(Site.CACHE)
    def keep(self, entries: CachedKV, call: Call) -> Tensor:
        score = entries.positions.position.float().expand(entries.key.shape[:3])
        return keep_best(score.masked_fill(newest(entries, call, 2), torch.inf), entries, room(self.budget, call))


def held(budget: Budget, ids: Tensor, text: Tensor, chunks: tuple[int, ...]) -> tuple[Any, list[list[int]]]:
    """The cache after these chunks of a prompt, and the indices that the first head of each text holds."""
    model, cache = tiny("llama"), DynamicCache()
    with attach(model, Best(budget)) as run, torch.no_grad():
        start = 0
        for n in chunks:
            stop = start + n
            run(ids[:, start:stop], attention_mask=text[:, :stop].long(), **{CACHE: cache})
            start = stop
    layer = cache.layers[0]
    return cache, [layer.index[row, 0][layer.is_filled[row, 0]].tolist() for row in range(len(ids))]


@pytest.mark.parametrize("budget", [6, 0.5])
@pytest.mark.parametrize("chunks", [(20,), (8, 12), (12, 8), (10, 4, 3, 3)])
def test_padding_on_the_right_keeps_nothing(budget: Budget, chunks: tuple[int, ...]) -> None:
    _, found = held(budget, IDS, TEXT.clone(), chunks)
    if budget == 6:
        assert found == [list(range(14, 20)), list(range(6, 12))]
    elif chunks == (20,):
        assert found == [list(range(10, 20)), list(range(6, 12))], "half of 20 tokens and of 12"
    # the same text alone, which ends where it ends
    alone = tuple(n for n in (min(12 - sum(chunks[:i]), n) for i, n in enumerate(chunks)) if n > 0)
    assert held(budget, IDS[1:, :12], torch.ones(1, 12, dtype=torch.bool), alone)[1] == found[1:]


def test_the_next_token_goes_on_after_padding_on_the_right() -> None:
    ids = torch.cat([IDS, IDS[:, :2]], 1)
    text = torch.cat([TEXT, torch.ones(2, 2, dtype=torch.bool)], 1)
    _, found = held(6, ids, text, (20, 1, 1))
    assert found == [list(range(16, 22)), [8, 9, 10, 11, 20, 21]]


def test_a_chunk_of_padding_on_the_left_holds_nothing() -> None:
    _, found = held(0.5, IDS, TEXT.flip(-1), (8, 6, 6))
    assert found[1] == list(range(14, 20)), "half of 12 tokens"
