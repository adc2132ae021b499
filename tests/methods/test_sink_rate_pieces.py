"""A text counts as one text, in however many calls it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.core.errors import GuessedWarning, StatisticError
from heedful.methods.observe.sink_rate import SinkRate, Sinks

IDS = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
LOW = SinkRate(0.05)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama").eval()


def read(model: Any, *pieces: Tensor) -> Sinks:
    cache = None
    with attach(model, LOW) as run, torch.no_grad():
        for piece in pieces:
            cache = run(input_ids=piece, use_cache=True, **{CACHE: cache})[CACHE]
        return run[LOW]


def same(a: Sinks, b: Sinks) -> None:
    for n in a.rate:
        torch.testing.assert_close(a.rate[n], b.rate[n], equal_nan=True)
        torch.testing.assert_close(a.importance[n], b.importance[n], equal_nan=True)


@pytest.mark.parametrize("cuts", [(16, 32), (1,), (39,), (2, 3, 4)])
def test_a_text_in_pieces_is_that_text(model: Any, cuts: tuple[int, ...]) -> None:
    pieces = IDS.tensor_split(cuts, dim=1)
    if any(piece.shape[1] == 1 for piece in pieces[1:]):  # one token is a decoding step
        pieces = tuple(piece for piece in pieces if piece.shape[1] > 1)
    same(read(model, *pieces), read(model, torch.cat(pieces, 1)))


def test_chunks_of_a_prompt_are_one_text(model: Any) -> None:
    with attach(model, LOW) as run:
        run.generate(IDS, max_new_tokens=4, prefill_chunk_size=16, do_sample=False, pad_token_id=0)
    same(run[LOW], read(model, IDS))


def test_what_follows_decoding_is_no_new_text(model: Any) -> None:
    cache = None
    with attach(model, LOW) as run, torch.no_grad():
        for piece in (IDS[:, :20], IDS[:, 20:21], IDS[:, 21:30]):
            cache = run(input_ids=piece, use_cache=True, **{CACHE: cache})[CACHE]
    same(run[LOW], read(model, IDS[:, :20]))


def test_guesses_add_no_texts(model: Any) -> None:
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    with attach(model, LOW) as run, pytest.warns(GuessedWarning, match="counts guessed tokens too"):
        run.generate(prompt, max_new_tokens=12, prompt_lookup_num_tokens=4, do_sample=False, pad_token_id=0)
    (stat, *_) = run.state.statistics.values()
    assert float(stat.early_count[0].max()) == 1  # type: ignore[attr-defined]


def test_packed_texts_are_refused(model: Any) -> None:
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    with pytest.raises(StatisticError, match="several are packed into one row"), attach(model, LOW) as run:
        run(input_ids=IDS[:1], position_ids=positions)
