"""Cosines to the first token against the hidden states that the model gives out."""

from functools import partial

import pytest
import torch

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.core.errors import FieldError, StatisticError
from heedful.methods.observe.parallel_to_first import ParallelToFirst
from tests import readers
from tests.readers import ids, padded

METHOD = ParallelToFirst(0.35)  # a cosine that tokens of a tiny random model reach
found = partial(readers.found, method=METHOD)


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3)


def test_counts_the_cosines_to_the_first_token(model) -> None:
    text = torch.cat([ids(40, 1), ids(40, 2)])
    parallels = found(model, {"input_ids": text})
    with torch.no_grad():
        states = model(input_ids=text, output_hidden_states=True).hidden_states
    for n in (0, 1):  # the last state that the model gives out is normalised
        x = states[n + 1]
        cosine = torch.cosine_similarity(x[:, 1:], x[:, :1], dim=-1)
        near = (cosine >= METHOD.near).double().mean()
        assert 0 < near < 0.5
        assert parallels.near_share(n) == pytest.approx(float(near))
        assert abs(parallels.mean(n) - float(cosine.mean())) < 0.025  # half a bin
        assert parallels.spread[n].sum() == 78
    assert "by layer 0" in str(parallels)


def test_a_copy_of_the_first_token_runs_parallel_to_it() -> None:
    alone = models.tiny("llama", num_hidden_layers=1)
    with torch.no_grad():
        alone.model.layers[0].self_attn.o_proj.weight.zero_()  # nothing mixes, so equal tokens stay equal
    text = ids(10)
    text[0, 6] = text[0, 0]
    method = ParallelToFirst(0.99)
    assert found(alone, {"input_ids": text}, method=method).near_share(0) == pytest.approx(1 / 9)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(model, left: bool) -> None:
    short, long = ids(11, 1), ids(17, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    together = found(model, padded(short, long, left))
    for n, counts in apart.spread.items():
        assert torch.equal(together.spread[n], counts)
        assert counts.sum() == 26


def test_later_pieces_of_a_text_are_left_out(model) -> None:
    with heedful.attach(model, METHOD) as run, torch.no_grad():
        out = run(input_ids=ids(12), use_cache=True)
        run(input_ids=ids(5), **{CACHE: out[CACHE]}, use_cache=True)
        run(input_ids=ids(1), **{CACHE: out[CACHE]}, use_cache=True)
        assert run[METHOD].spread[0].sum() == 11
    with heedful.attach(model, METHOD) as run, pytest.raises(StatisticError, match="read nothing yet"):
        run[METHOD]


def test_tells_where_tokens_run_parallel(model) -> None:
    answer = found(model, {"input_ids": ids(40, 1)})
    told = METHOD.describe(answer)
    assert told.figures[0].values.sum(-1).tolist() == pytest.approx([1.0] * 3)
    assert "some tokens point the same way" in told.findings[0].text
    none = ParallelToFirst(0.999)
    assert not none.describe(found(model, {"input_ids": ids(40, 1)}, method=none)).findings


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_says_what_is_wrong(bad: float) -> None:
    with pytest.raises(FieldError, match="near"):
        ParallelToFirst(bad)


def test_bins_of_a_twentieth_and_one_at_the_threshold() -> None:
    assert ParallelToFirst(0.92).edges == pytest.approx((*(i / 20 for i in range(-20, 19)), 0.92, 0.95, 1.0))
    assert len(ParallelToFirst(0.9).edges) == 41
