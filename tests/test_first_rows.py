"""Readers of a pattern's first rows: beside any backend, and in tiles where something edits the map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.core.call import Call
from heedful.core.errors import DefinitionError
from heedful.core.mask import Blocks, Mask
from heedful.core.method import Method, Stack
from heedful.core.sites import Site, adds, at, reads
from heedful.core.stats import Cat, Statistic, Sum
from heedful.core.summary import Summary, sums
from heedful.methods import SigmoidAttention, SinkRate, SinkWindow, TempScale


class _Rows(Method):
    """The pattern's first rows as they are, spread over all columns."""

    rows: int = 0  # 0: all

    @reads(Site.PATTERN, first="rows")
    def keep(self, weights: Tensor, call: Call) -> Statistic:
        whole = weights.new_zeros(*weights.shape[:-1], IDS.shape[1])
        whole[..., call.cols] = weights
        assert weights.shape[3], "a row has a column, also where it sees none"
        assert weights.shape[2] == len(call.queries) == call.rows.stop - (call.rows.start or 0)
        assert call.keep is None or call.keep.shape[2] in (1, weights.shape[2])
        return Cat.of(f"{call.rows.start or 0:04d}", whole)


class _Wave(Method):
    """Adds a wave to scores."""

    @adds
    def swell(self, call: Call) -> Tensor:
        return (call.pairs.q * 3 + call.pairs.k).sin()


IDS = torch.arange(5, 65).view(2, 30)


def rows(model: Any, method: _Rows, *more: Any, **how: Any) -> tuple[list[Tensor], set[str]]:
    part: Any = method if "heads" not in how else method.on(heads=how.pop("heads"))
    with attach(model, Stack((*more, part)), **how) as run, torch.no_grad():
        run(input_ids=IDS, use_cache=False, attention_mask=torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0))
    found = [run.state.statistics[0 + len(more), "keep", layer] for layer in range(2)]
    return [torch.cat(x.value, 2) for x in found], set(run.state.backends.values())


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        (SinkWindow(1, 3),),
        (TempScale(0.5),),
        (SinkRate(),),
        (SigmoidAttention(),),
        (SigmoidAttention().on(heads=[1]),),
        (_Wave(),),
        (SigmoidAttention(), _Wave()),
    ],
)
@pytest.mark.parametrize("tile_rows", [None, 4])
def test_they_are_those_of_the_whole_pattern(
    kind: str, more: tuple[Any, ...], tile_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heedful.engine.attend.FIRST_ROWS", 3)
    model = models.tiny(kind)
    whole, _ = rows(model, _Rows(), *more, backend="reference")
    some, _ = rows(model, _Rows(7), *more, tile_rows=tile_rows)
    for a, b in zip(some, whole, strict=True):
        assert a.shape[2] == 7
        torch.testing.assert_close(a, b[:, :, :7])


def test_they_rule_no_backend_out() -> None:
    model = models.tiny("llama")
    plain = attach(model, SinkRate())
    with plain, torch.no_grad():
        plain(input_ids=IDS)
    assert rows(model, _Rows(7), SinkRate())[1] == set(plain.state.backends.values())
    assert rows(model, _Rows(7))[1] == {"sdpa"}
    assert rows(model, _Rows())[1] == {"tiled"}
    for more in (SigmoidAttention(), _Wave()):
        with attach(model, more) as alone, torch.no_grad():
            alone(input_ids=IDS, attention_mask=torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0))
        assert rows(model, _Rows(7), more)[1] == set(alone.state.backends.values())
    assert rows(model, _Rows(7), SigmoidAttention().on(heads=[1]))[1] == {"tiled"}


def test_the_first_of_them_are_computed_for_the_keys_that_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heedful.engine.attend.FIRST_ROWS", 3)
    widths = []

    class _Wide(_Rows):
        @reads(Site.PATTERN, first="rows")
        def keep(self, weights: Tensor, call: Call) -> Statistic | None:
            widths.append(tuple(weights.shape[2:]))
            return None

    with attach(models.tiny("llama"), _Wide(7).on(layers=[0])) as run, torch.no_grad():
        run(input_ids=IDS)
    assert widths == [(3, 3), (3, 6), (1, 7)]


class _Received(Method):
    """What each key received."""

    @sums("received")
    def look(self, summary: Summary, call: Call) -> Statistic:
        return Sum.of(summary.received)


def test_readers_of_unlike_many_rows_and_of_sums_do_not_meet() -> None:
    model = models.tiny("llama")
    whole, _ = rows(model, _Rows(), backend="reference")
    told = []
    for stack in (Stack((_Received(),)), Stack((_Rows(2), _Received(), _Rows(7)))):
        with attach(model, stack, backend="tiled") as run, torch.no_grad():
            run(input_ids=IDS, attention_mask=torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0))
        told.append([x.value for step, x in sorted(run.state.statistics.items()) if step[1] == "look"])
    assert len(told[0]) == 2
    for one, other in zip(*told, strict=True):
        assert torch.equal(one, other)
    for layer, part, many in ((i, part, many) for i in range(2) for part, many in ((0, 2), (2, 7))):
        found = torch.cat(run.state.statistics[part, "keep", layer].value, 2)
        torch.testing.assert_close(found, whole[layer][:, :, :many])


class _Nothing(Method):
    """No query sees a key."""

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:
        return mask & Blocks(torch.zeros(1, 1, 1, 1, dtype=torch.bool), 32)


def test_rows_that_see_nothing_are_zeros() -> None:
    for found in rows(models.tiny("llama"), _Rows(3), _Nothing())[0]:
        assert found.shape == (2, 4, 3, 30)
        assert not found.any()


def test_some_heads_and_more_rows_than_there_are() -> None:
    model = models.tiny("llama")
    whole, _ = rows(model, _Rows())
    some, _ = rows(model, _Rows(99), heads=[1, 3])
    for a, b in zip(some, whole, strict=True):
        torch.testing.assert_close(a, b[:, [1, 3]])


def test_no_other_site_is_read_so() -> None:
    with pytest.raises(DefinitionError, match="only PATTERN is read by rows"):
        reads(Site.QUERY, first="rows")
    with pytest.raises(DefinitionError, match="first='row' names no field"):

        class _Odd(Method):
            @reads(Site.PATTERN, first="row")
            def keep(self, weights: Tensor, call: Call) -> Statistic | None:
                return None
