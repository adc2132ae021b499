"""Edits that look at the rows above their own: in every tiling, and token by token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close, close_model
from heedful.core.call import Call
from heedful.core.errors import SiteError
from heedful.core.mask import First, Mask, Window
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.rules import Rule
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat
from heedful.core.summary import Summary, sums
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from tests.samples import Sharpness

PAPER = Paper("none", "A test", "heedful", 2026)
IDS = torch.randint(3, 100, (2, 23), generator=torch.Generator().manual_seed(0))


class Neighbours(Method):
    """Each score takes something of the rows above it; scores that are not computed count as 0."""

    paper = PAPER
    rows: int = 3

    def above(self) -> int:
        return self.rows - 1

    @at(Site.SCORES)
    def mix(self, scores: Tensor, call: Call) -> Tensor:
        scores = scores if call.keep is None else scores.masked_fill(~call.keep, 0.0)
        out = scores.clone()
        for i in range(1, min(self.rows, scores.shape[2])):
            out[:, :, i:] += 0.5**i * scores[:, :, :-i]
        return out


class Narrow(Method):
    """A few sinks and a window, as a mask alone: the cache keeps all."""

    paper = PAPER

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & (Window(9) | First(2))


@pytest.mark.parametrize(
    "stack",
    [
        Neighbours(),
        TempScale(0.5) | Neighbours(),
        Neighbours(4) | Neighbours(2),
        SinkWindow(2, 8) | Neighbours(),
        Neighbours() | Sharpness(),
    ],
    ids=repr,
)
def test_neighbours_are_the_same_in_every_tiling(stack: Method) -> None:
    model = models.tiny("llama").eval()
    logits, losses = [], []
    for rows in (None, 64, 7, 1):
        backend = "reference" if rows is None else "tiled"
        with attach(model, stack, backend=backend, tile_rows=rows) as run, torch.no_grad():
            logits.append(run(input_ids=IDS).logits)
            losses.append(run.loss() if "Sharpness" in repr(stack) else torch.zeros(()))
    assert all(close_model(x, logits[0]) for x in logits[1:])
    assert all(close(x, losses[0]) for x in losses[1:])


class Entropies(Method):
    """Keeps the entropy of every row."""

    paper = PAPER

    @sums("entropy")
    def keep(self, pattern: Summary, call: Call) -> Cat:
        assert pattern.entropy is not None
        return Cat.of("entropy", pattern.entropy)


def test_rows_above_are_what_they_are_called_for() -> None:
    """By hand, from the scores of one call."""
    model = models.tiny("llama").eval()
    seen = {}

    class Spy(Method):
        paper = PAPER

        @reads(Site.SCORES)
        def keep(self, scores: Tensor, call: Call) -> None:
            seen.setdefault(call.layer, []).append(scores.masked_fill(~call.keep, 0.0))

    with attach(model, Spy(), backend="reference") as run, torch.no_grad():
        run(input_ids=IDS)
    with attach(model, Neighbours() | Spy(), tile_rows=5, backend="tiled") as run, torch.no_grad():
        run(input_ids=IDS)
    plain, *tiles = seen[0]
    want = plain.clone()
    for i in range(plain.shape[2]):
        for back in (1, 2):
            if i >= back:
                want[:, :, i] += 0.5**back * plain[:, :, i - back]
    want = want.masked_fill(~torch.ones(23, 23, dtype=torch.bool).tril(), 0.0)
    assert [tuple(x.shape[2:]) for x in tiles] == [
        (5, 5),
        (5, 10),
        (5, 15),
        (5, 20),
        (3, 23),
    ]  # of all columns those seen
    assert close(torch.cat([torch.nn.functional.pad(x, (0, 23 - x.shape[3])) for x in tiles], 2), want)


@pytest.mark.parametrize(("rule", "first"), [(Window(2), 13), (Window(2) | First(1), 0)], ids=repr)
def test_columns_are_neighbours_from_the_first_that_is_seen_to_the_last(rule: Rule, first: int) -> None:
    seen = []

    class Few(Method):
        paper = PAPER

        @at(Site.MASK)
        def narrow(self, mask: Mask, call: Call) -> Mask:
            return mask & rule

        @reads(Site.SCORES)
        def note(self, scores: Tensor, call: Call) -> None:
            seen.append(call.cols)

    with (
        attach(models.tiny("llama").eval(), Few() | Neighbours(), tile_rows=4, backend="tiled") as run,
        torch.no_grad(),
    ):
        run(input_ids=IDS)
    assert seen[4] == slice(first, 20)  # of rows 16 to 19, and of two above them


def test_rows_are_numbered_without_those_of_earlier_calls() -> None:
    rows = []

    class Where(Method):
        paper = PAPER

        @reads(Site.SCORES)
        def note(self, scores: Tensor, call: Call) -> None:
            rows.append((call.rows.start, call.rows.stop))

    with attach(models.tiny("llama").eval(), Neighbours() | Where(), backend="reference") as run, torch.no_grad():
        out = run(input_ids=IDS[:, :6], use_cache=True)
        rows.clear()
        run(input_ids=IDS[:, 6:8], use_cache=True, **{CACHE: out[CACHE]})
    assert set(rows) == {(0, 2)}


@pytest.mark.parametrize("stack", [Neighbours(3), Neighbours(2) | Neighbours(3), Narrow() | Neighbours(4)], ids=repr)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_rows_above_go_with_the_cache(stack: Method, backend: str) -> None:
    """Token by token, in chunks, with left padding and with rows swapped in between: as the whole text at once."""
    model = models.tiny("llama").eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with attach(model, stack, backend=backend, tile_rows=2) as run, torch.no_grad():
        whole = run(input_ids=IDS, attention_mask=mask, position_ids=place).logits
        for cuts in ((0, 9, 10, 11, 23), (0, 1, 2, 7, 21, 22, 23)):
            cache, parts, ids, seen = None, [], IDS, mask
            for start, stop in itertools.pairwise(cuts):
                out = run(
                    input_ids=ids[:, start:stop], attention_mask=seen[:, :stop],
                    position_ids=place[:, start:stop], use_cache=True, **{CACHE: cache},
                )  # fmt: skip
                cache = out[CACHE]
                parts.append(out.logits)
            assert close_model(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])
        swapped = run(input_ids=IDS[:, :20], use_cache=True)[CACHE]
        swapped.reorder_cache(torch.tensor([1, 0]))
        found = run(input_ids=IDS.flip(0)[:, 20:], use_cache=True, **{CACHE: swapped}).logits
        assert close_model(found, run(input_ids=IDS.flip(0)).logits[:, 20:])


def test_rows_above_that_were_cut_off_are_missed() -> None:
    model = models.tiny("llama").eval()
    with attach(model, Neighbours(3)) as run, torch.no_grad():
        cache = run(input_ids=IDS[:, :9], use_cache=True)[CACHE]
        cache.crop(-3)
        with pytest.raises(SiteError, match="cut back"):
            run(input_ids=IDS[:, 6:8], use_cache=True, **{CACHE: cache})


@pytest.mark.parametrize("drops", [SinkWindow(2, 6), KNorm(6), HeavyHitter(6)], ids=repr)
def test_rows_above_that_saw_dropped_keys_are_refused(drops: Method) -> None:
    """A neighbour may lie in another column, so that what was dropped is missed; reading at once drops nothing."""
    model = models.tiny("llama").eval()
    with attach(model, drops | Neighbours(3)) as run, torch.no_grad():
        run(input_ids=IDS)
        cache = run(input_ids=IDS[:, :4], use_cache=True)[CACHE]
        cache = run(input_ids=IDS[:, 4:6], use_cache=True, **{CACHE: cache})[CACHE]  # all still held
        cache = run(input_ids=IDS[:, 6:9], use_cache=True, **{CACHE: cache})[CACHE]
        with pytest.raises(SiteError, match="layer 0: an edit looks at rows above its own, and its cache no longer"):
            run(input_ids=IDS[:, 9:10], use_cache=True, **{CACHE: cache})


def test_rows_above_in_a_cache_that_slid_are_refused() -> None:
    model = models.tiny("mistral", sliding_window=6).eval()
    with attach(model, Neighbours(3)) as run, torch.no_grad():
        cache = run(input_ids=IDS[:, :9], use_cache=True)[CACHE]
        with pytest.raises(SiteError, match="no longer holds what these saw"):
            run(input_ids=IDS[:, 9:10], use_cache=True, **{CACHE: cache})


@torch.no_grad()
def test_rows_above_that_were_read_without_the_edit_are_missed() -> None:
    model = models.tiny("llama").eval()

    def read(by: Any, upto: int, cache: Any = None, since: int = 0) -> Any:
        return by(input_ids=IDS[:, since:upto], use_cache=True, **{CACHE: cache})[CACHE]

    plain = read(model, 9)
    with attach(model, Neighbours(4)) as other:
        edited = read(other, 9)
    with attach(model, Neighbours(3)) as run:
        read(run, 9)
        for cache in (plain, edited):
            with pytest.raises(SiteError, match="not read under it; read the text from its beginning"):
                read(run, 10, cache, 9)
        cache = read(run, 7)
        with run.paused():
            read(model, 9, cache, 7)
        with pytest.raises(SiteError, match="grew without it"):
            read(run, 10, cache, 9)
    late = Neighbours(3).when("decode")
    with pytest.raises(SiteError, match="in every phase"), attach(model, late) as run:
        read(run, 10, read(run, 9), 9)
