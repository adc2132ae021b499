"""Profiles: values that save, load, merge and tell."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import models
from heedful.core.errors import FieldError, HeedfulError, StatisticError
from heedful.core.figures import Curves, Grid, HeadMap, Listing
from heedful.core.files import digest_of
from heedful.diagnosis import run as running
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.run import diagnose
from heedful.methods.observe.sink_rate import SinkRate
from tests.test_diagnose import Marked
from tests.test_diagnose_texts import WORDS, characters


@pytest.fixture
def model() -> Any:
    return models.tiny("llama")


def test_a_profile_saves_and_loads(model: Any, tmp_path: Path) -> None:
    parts = [SinkRate(0.2), SinkRate().on(layers=[1], heads=[0, 2]).when("prefill")]
    profile = diagnose(model, WORDS, tokenizer=characters(), measures=parts)
    for _ in range(2):  # the second takes the place of the first
        profile.save(tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2
    again = Profile.load(tmp_path / "kept")
    assert again.parts == profile.parts
    assert again.facts == profile.facts
    assert str(again) == str(profile)
    assert set(again.statistics) == set(profile.statistics)
    assert all(
        torch.equal(x, again.statistics[k].tensors()[n])
        for k, s in profile.statistics.items()
        for n, x in s.tensors().items()
    )
    assert again.view is not None
    assert profile.view is not None
    assert again.view.tokens == profile.view.tokens
    assert again.view.heads == profile.view.heads
    assert torch.equal(again.view.keys, profile.view.keys)


def test_the_times_add_up_to_what_a_call_takes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from heedful.diagnosis import inputs

    def slowly(*given: Any, act: Any = inputs.cut) -> Any:  # as what has to be written down before it is read
        time.sleep(0.5)
        return act(*given)

    monkeypatch.setattr(inputs, "cut", slowly)
    began = time.perf_counter()
    seconds = diagnose(model, WORDS, tokenizer=characters(), measures=SinkRate()).facts["seconds"]
    whole = time.perf_counter() - began
    assert seconds["preparing"] > 0.5
    assert 0.8 * whole < sum(seconds.values()) < whole


def test_what_is_told_before_there_is_a_view_is_not_told_anew(model: Any) -> None:
    profile = diagnose(model, WORDS, tokenizer=characters(), measures=SinkRate())
    told = profile.description()
    again = profile.viewed(None, 2.0)
    assert again.description() is told
    assert again.view is None
    assert again.facts["seconds"]["view"] == profile.facts["seconds"]["view"] + 2.0
    assert "_told" not in vars(Profile(profile.facts, profile.parts, profile.statistics).viewed(None, 1.0))


def test_profiles_of_two_texts_add_up_to_that_of_both(model: Any) -> None:
    one, two, both = (
        diagnose(model, texts, tokenizer=characters(), measures=SinkRate())
        for texts in (WORDS[:40], [WORDS[9:], "abc,"], [WORDS[:40], WORDS[9:], "abc,"])
    )
    merged = one + two
    for key, stat in both.statistics.items():
        torch.testing.assert_close(merged.statistics[key].value, stat.value, equal_nan=True)
    assert {k: merged.facts[k] for k in ("texts", "tokens")} == {k: both.facts[k] for k in ("texts", "tokens")}
    assert merged.facts["seconds"]["text"] == one.facts["seconds"]["text"] + two.facts["seconds"]["text"]
    assert merged.view is one.view
    assert str(sum([one, two])) == str(merged)
    with pytest.raises(TypeError):
        1 + one  # type: ignore[operator]


def test_what_a_model_is_called_parts_no_profiles(model: Any, tmp_path: Path) -> None:
    """One from the command line and one from Python have other names for the same weights."""
    named = diagnose(models.Loaded(model, None, "us/small"), torch.arange(8), measures=SinkRate(), out=tmp_path)
    assert (named + diagnose(model, torch.arange(8), measures=SinkRate())).facts["model"] == "us/small"
    assert diagnose(model, torch.arange(8), measures=SinkRate(), out=tmp_path).facts["model"] == "us/small"


def test_profiles_of_unlike_models_or_measures_do_not_merge(model: Any) -> None:
    one = diagnose(model, torch.arange(8))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(StatisticError, match="whose weights is"):
        one + diagnose(model, torch.arange(8))
    with pytest.raises(StatisticError, match="measures must agree"):
        one + diagnose(model, torch.arange(8), measures=SinkRate(0.1))


def test_a_profile_tells(model: Any) -> None:
    profile = diagnose(model, WORDS, tokenizer=characters(), measures=[SinkRate(), Marked()])
    assert [part for part, _ in profile.description()] == [SinkRate(), Marked()]
    assert profile.findings()[0].text in str(profile)
    everything = [finding.weight for finding in diagnose(model, WORDS, tokenizer=characters()).findings()]
    assert everything == sorted(everything, reverse=True)
    assert len(set(everything)) > 2
    whole = diagnose(model, WORDS, tokenizer=characters())
    assert {finding.shows for finding in whole.findings()} - {""} <= whole.figures().keys()
    assert f"2 layers of 4 heads, 1 text of {len(WORDS)} tokens" in profile.headline
    assert profile.findings()[0].text.replace(">", "&gt;") in profile._repr_html_()
    assert any(isinstance(figure, HeadMap) for figure in profile.figures().values())
    with pytest.raises(FieldError, match="must be one of"):
        profile.answer(SinkRate(0.5))
    silent = Profile(profile.facts, (SinkRate(),), {})
    assert silent.description() == []
    with pytest.raises(StatisticError, match="has read nothing"):
        silent.answer(SinkRate())


def test_tables_hold_every_kind_of_figure(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    figures = {
        "map": HeadMap("map", "", "", [3, 7], torch.tensor([[0.0, 1.0], [2.0, 3.0]])),
        "grid": Grid("grid", "", "", torch.tensor([[1.0, 2.0]]), ["a"], ["x", "y"], "row", "column"),
        "curves": Curves("curves", "", "", [1, 2], {"head 1.0": torch.tensor([5.0, 6.0])}, "position", "weight"),
        "listing": Listing("listing", "", "", ["token", "times"], [["the", 3]]),
    }
    monkeypatch.setattr(Profile, "figures", lambda _: figures)
    found = diagnose(model, torch.arange(8)).tables()
    assert found["map"].values.tolist() == [[3, 0, 0.0], [3, 1, 1.0], [7, 0, 2.0], [7, 1, 3.0]]
    assert found["grid"].to_dict("records")[1] == {"row": "a", "column": "y", "value": 2.0}
    assert found["curves"].to_dict("records")[1] == {"line": "head 1.0", "position": 2, "weight": 6.0}
    assert found["listing"].to_dict("records") == [{"token": "the", "times": 3}]
    assert {"roles", "findings"} < set(found)
    assert isinstance(found["roles"], pandas.DataFrame)


def test_tables_without_their_package(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("heedful.diagnosis.tables.import_module", missing)
    with pytest.raises(HeedfulError, match="pip install pyarrow"):
        diagnose(model, torch.arange(8)).tables(arrow=True)


@pytest.mark.parametrize("failing", ["heedful.diagnosis.store.replace_text", "safetensors.torch.save_file"])
def test_a_full_disk_leaves_nothing_half_written(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    old = diagnose(model, "abc,", tokenizer=characters())
    old.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(StatisticError, match=r"No space left on device.*Free some space"):
        diagnose(model, "abcd,", tokenizer=characters()).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_is_no_profile_cannot_be_loaded(model: Any, tmp_path: Path) -> None:
    with pytest.raises(StatisticError, match="holds no profile"):
        Profile.load(tmp_path)
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(StatisticError, match="holds no profile"):
        Profile.load(tmp_path)
    profile = diagnose(model, "ab,", tokenizer=characters())
    profile.save(tmp_path)
    text = json.loads((tmp_path / "profile.json").read_text())
    (tmp_path / "profile.json").write_text(json.dumps({**text, "format": 0}))
    with pytest.raises(StatisticError, match="another release"):
        Profile.load(tmp_path)
    text["parts"][0]["method"] = "SinkRat"
    (tmp_path / "profile.json").write_text(json.dumps(text))
    with pytest.raises(StatisticError, match="was damaged or changed"):
        Profile.load(tmp_path)
    (tmp_path / "profile.json").write_text(json.dumps({**text, "digest": digest_of(text)}))
    with pytest.raises(HeedfulError, match=r"Did you mean SinkRate\?"):
        Profile.load(tmp_path)


def test_a_measure_whose_code_has_changed_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Profile:
        return diagnose(models.tiny("llama"), torch.arange(5, 37), measures="SinkRate", out=tmp_path / "out")

    found()
    found()  # read from the folder
    monkeypatch.setattr(running, "code_of", lambda *_: "of another day")
    with pytest.raises(StatisticError, match=r"holds a diagnosis with other settings: its code is '[0-9a-f]{16}'"):
        found()
