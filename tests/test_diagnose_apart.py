"""Texts in parts: curves between what the parts have by themselves, and profiles that stay small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import diagnose, models
from heedful.core import stats
from heedful.core.figures import Curves, Description
from heedful.core.stats import Mean, Sum
from heedful.diagnosis.apart import MOST, banded, dealt
from heedful.diagnosis.profile import Profile
from heedful.methods import AttentionFlow, AttentionProfile, MaxActivations, SinkRate

MEASURES = [SinkRate(0.1, places=4), AttentionProfile(), MaxActivations()]
TEXTS = [torch.randint(3, 127, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 31, 26)]


@pytest.fixture(scope="module")
def model() -> Any:
    return models.tiny("llama")


def curves(profile: Profile) -> dict[str, Curves]:
    return {key: figure for key, figure in profile.figures().items() if isinstance(figure, Curves)}


def test_bands_reach_from_the_lowest_to_the_highest_text(model: Any) -> None:
    together = curves(diagnose(model, TEXTS, measures=MEASURES))
    alone = [curves(diagnose(model, text, measures=MEASURES)) for text in TEXTS]
    assert set(together) == {"sink_positions", "distances", "maxima"}
    for key, figure in together.items():
        assert "3 parts" in figure.band
        assert set(figure.bands) == set(figure.lines)
        for name, (low, high) in figure.bands.items():
            for i, x in enumerate(figure.x):
                known = [float(one[key].lines[name][list(one[key].x).index(x)]) for one in alone if x in one[key].x]
                if len(known) > 1:
                    assert float(low[i]) == pytest.approx(min(known), rel=1e-4)
                    assert float(high[i]) == pytest.approx(max(known), rel=1e-4)
                else:
                    assert low[i].isnan()
                    assert high[i].isnan()
    assert "heads" in alone[0]["distances"].band  # of one text nobody knows how much texts differ
    assert alone[0]["maxima"].bands == {}


def test_pieces_that_a_measure_keeps_whole_are_kept_in_parts_too(model: Any) -> None:
    found = diagnose(model, TEXTS, measures=AttentionFlow())
    pieces = [x for part in found.apart for stat in part.values() for x in stat.tensors().values()]
    assert len(pieces) == len(TEXTS)
    assert all(x.dtype == torch.float32 for x in pieces)


def test_where_one_part_alone_tells_there_is_no_band() -> None:
    def told(*values: float) -> Description:
        line = {"line": torch.tensor(values)}
        return Description((Curves("key", "Title", "What.", range(len(values)), line, "x", "y"),))

    (figure,) = banded(told(1.5, 2.5, 4.0), [told(1.0, 3.0), told(2.0, 2.0, 4.0)]).figures
    assert isinstance(figure, Curves)
    low, high = figure.bands["line"]
    assert low[:2].tolist() == [1.0, 2.0]
    assert high[:2].tolist() == [2.0, 3.0]
    assert low[2].isnan()
    assert high[2].isnan()


def test_windows_of_one_text_are_parts_of_it(model: Any) -> None:
    text = torch.cat(TEXTS)[:60]
    whole = diagnose(model, text, measures=MEASURES, length=20)
    alone = [diagnose(model, row, measures=MEASURES) for row in text.split(20)]
    merged = alone[0] + alone[1] + alone[2]
    for figures in zip(*(curves(p).values() for p in (whole, merged)), strict=True):
        assert len(figures[0].bands) > 0
        for name, edges in figures[0].bands.items():
            for mine, theirs in zip(edges, figures[1].bands[name], strict=True):
                torch.testing.assert_close(mine, theirs, equal_nan=True)


def test_parts_beyond_the_most_are_dealt_out() -> None:
    parts = [{"0.x.0": Sum.of(torch.tensor([2.0**i], dtype=torch.float64))} for i in range(MOST + 2)]
    totals = [float(part["0.x.0"].value) for part in dealt(parts)]
    assert totals == [1.0 + 2**MOST, 2.0 + 2 ** (MOST + 1), *(2.0**i for i in range(2, MOST))]
    assert dealt(parts[:1]) == dealt([{}, parts[0]]) == ()


def test_a_diagnosis_that_was_stopped_has_the_parts_of_one_that_was_not(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(now: Any) -> None:
        if now.done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(model, TEXTS, measures=MEASURES, out=tmp_path, progress=stop)
    later = diagnose(model, TEXTS, measures=MEASURES, out=tmp_path)
    straight = diagnose(model, TEXTS, measures=MEASURES)
    for profile in (later, Profile.load(tmp_path)):
        assert len(profile.apart) == 3
        for mine, wanted in zip(profile.apart, straight.apart, strict=True):
            assert set(mine) == set(wanted)
            for key, stat in wanted.items():
                for name, x in stat.tensors().items():
                    torch.testing.assert_close(mine[key].tensors()[name], x)


def test_what_is_alike_and_what_is_whole_takes_little_room(tmp_path: Path) -> None:
    counted = Mean.of(torch.rand(30, 1000, dtype=torch.float64), 7)
    kept = {"a": counted, "b": Sum.of(torch.arange(4000.0)), "c": Sum.of(torch.tensor([1.5, float("nan"), 1e300]))}
    path = stats.save(tmp_path / "x.safetensors", kept)
    assert path.stat().st_size < 8 * 30_000 + 2 * 4000 + 4000
    for name, stat in stats.load(path).items():
        for field, x in kept[name].tensors().items():
            found = stat.tensors()[field]
            assert found.dtype == x.dtype
            assert torch.equal(found.nan_to_num(-1.0), x.nan_to_num(-1.0))


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 8192])
def test_a_profile_of_8000_tokens_is_small(default_model: models.Loaded, tmp_path: Path, length: int) -> None:
    made = torch.Generator().manual_seed(0)
    diagnose(default_model, torch.randint(100, 40000, (8192,), generator=made), length=length, out=tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 10e6


def test_parts_are_no_more_than_a_view_of_the_whole(model: Any) -> None:
    profile = diagnose(model, TEXTS, measures=MEASURES)
    bare = replace(profile, apart=())
    for key, figure in curves(profile).items():
        for name, line in figure.lines.items():
            assert torch.equal(line, curves(bare)[key].lines[name])
