"""The record of coverage: a sweep of some classes replaces their rows alone, and the page tells of both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.beside_torch import timm_for_transformers
from benchmarks.coverage import page, probe, rows, serve, tiny

RELEASES = {"transformers": "5.1.0", "torch": "2.13.0"}
BY_NAME = "refused: a.attn (Own: a softmax), b.attn (Own: a softmax) and c.attn (Other: a mix)"
WHY = "a.attn (Own) has no separate output projection"
NOT = {"status": "refused", "reason": WHY}
FIRST: list[dict[str, Any]] = [
    {"class": "B", "group": "base", "status": "refused", "reason": "one | other"},
    {
        "class": "A", "group": "text", "status": "served", "reason": "",
        "eager": {"layers": 3, "entered": 2, "through": {"roundings": 0.0}, "heads": {"status": "fine", "reason": ""}},
        "sdpa": {"layers": 3, "entered": 2, "through": {"roundings": 1.5}, "unseen": True},
        "generate": {"roundings": 0.5},
    },
    {"class": "C", "group": "base", "status": "refused", "through": False, "reason": BY_NAME},
    {"class": "D", "group": "base", "status": "cannot build", "through": False, "reason": "x" * 200},
    {"class": "Gone", "group": "base", "status": "served", "generate": {"roundings": 0.0}, "eager": {"heads": NOT}},
]  # fmt: skip


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of two sweeps: all classes under one release, then one class under the next, which lacks another."""
    monkeypatch.setattr(rows, "RECORD", tmp_path / "coverage.json")
    monkeypatch.setattr(rows, "version", RELEASES.__getitem__)
    rows.update(FIRST, ["A", "B", "C", "D", "Gone"])
    found = rows.told()
    found["classes"] = [row | {"date": "2026-01-02"} for row in found["classes"]]
    rows.RECORD.write_text(json.dumps(found))
    monkeypatch.setitem(RELEASES, "transformers", "5.2.0")
    again = {"class": "B", "group": "base", "status": "served", "generate": {"roundings": 0.0}, "eager": {"heads": NOT}}
    return rows.update([again], ["A", "B", "C", "D"])


def test_a_row_is_replaced_and_the_others_stay(record: Path) -> None:
    found = {row.pop("class"): row for row in json.loads(record.read_text())["classes"]}
    assert list(found) == ["A", "B", "C", "D"]  # what transformers does not name any more is gone
    today = found["B"].pop("date")
    told = {"heads": "refused", "heads_reason": WHY}
    assert found.pop("B") == {"group": "base", "status": "served", "generate": 0.0, **told, **RELEASES}
    assert today > "2026-01-02"
    old = {"date": "2026-01-02", "transformers": "5.1.0", "torch": "2.13.0"}
    assert found == {
        "A": old | {
            "group": "text", "status": "served", "layers": [2, 3], "eager": 0.0, "sdpa": 1.5, "generate": 0.5,
            "unseen": True, "heads": "fine",
        },
        "C": old | {
            "group": "base", "status": "refused", "outside": True,
            "reason": "Other: a mix; Own: a softmax",
        },
        "D": old | {"group": "base", "status": "cannot build", "reason": "x" * 160},
    }  # fmt: skip


def test_the_page_tells_both_releases(record: Path) -> None:
    found = json.loads(record.read_text())
    today, told = found["classes"][1]["date"], page.page()
    made = "3 classes with transformers 5.1.0 and torch 2.13.0; 1 classes with transformers 5.2.0 and torch 2.13.0."
    assert f"between 2026-01-02 and {today}, in float32: {made}" in told
    assert "Of 2 classes that go through the interface, 2 are served whole and 0 in part (100.0% together)" in told
    assert "Of 2 that generate, 1 do so bit for bit" in told
    assert "so check 4 says nothing: A." in told
    assert "| A | served | 2/3 | 0 | 1.5 | fine |" in told
    assert (
        "Of 2 classes that run under heedful, within the interface or outside, under *heads*: 1 fine, 1 refused" in told
    )
    assert "| Own has no separate output projection | B |" in told
    assert (
        "Of 1 more whose attention is all outside it, 0 are served whole and 0 in part (0.0% together), 1 are" in told
    )
    record.write_text(json.dumps(found | {"classes": [found["classes"][1] | {"date": "2026-01-02"}]}))
    assert "on 2026-01-02, in float32: 1 classes with transformers 5.2.0" in page.page()


def test_a_cell_ends_where_it_should(record: Path) -> None:
    rows.update(FIRST[:1], "AB")
    assert "| refused | one / other | B |" in page.page()


def test_heads_are_told_of_what_is_outside_the_interface_too(record: Path) -> None:
    rows.update(
        [{"class": "C", "group": "base", "status": "served", "through": False, "eager": {"heads": NOT}}], "ABCD"
    )
    told = page.page()
    assert "within the interface or outside, under *heads*: 1 fine, 2 refused, 0 not reached, 0 wrong." in told
    assert "| Own has no separate output projection | B, C |" in told


def test_what_is_served_tells_of_heads(record: Path) -> None:
    for eager in ({}, {"heads": {"status": "cannot build", "reason": "over 60 s"}}):
        with pytest.raises(
            ValueError, match=r"A: nothing is told of what is learned for each head \((no word|over 60 s)\)"
        ):
            rows.update([FIRST[1] | {"eager": eager}], "AB")
    found = json.loads(record.read_text())
    del found["classes"][0]["heads"]
    record.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="the row of A has no word for what is learned for each head; measure"):
        page.page()


def test_a_column_is_filled_alone(record: Path) -> None:
    before = rows.told()["classes"]
    rows.fill([{"class": "B", "group": "base", "status": "fine"}])
    after = rows.told()["classes"]
    assert after[1].pop("heads") == "fine"
    assert [row for row in after if row["class"] != "B"] == [row for row in before if row["class"] != "B"]
    assert after[1] == {key: x for key, x in before[1].items() if not key.startswith("heads")}
    rows.fill([{"class": "B", "group": "base", "status": "wrong", "reason": "moved nothing"}])
    assert rows.told()["classes"][1] == after[1] | {"heads": "wrong", "status": "wrong", "reason": "moved nothing"}
    with pytest.raises(ValueError, match=r"A was measured with transformers 5.1.0: sweep it anew, without --heads"):
        rows.fill([{"class": "A", "group": "text", "status": "fine"}])


def test_a_sweep_of_heads_asks_of_rows_that_lack_them(record: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(serve, "class_names", lambda: [("base", name) for name in "ABCDE"])
    options = argparse.Namespace(out=tmp_path / "out", only="", group="", again="", heads=True)
    assert serve.todo(options) == []
    found = json.loads(record.read_text())
    del found["classes"][0]["heads"]
    record.write_text(json.dumps(found))
    assert serve.todo(options) == [("base", "A")]
    again = argparse.Namespace(**vars(options) | {"again": "refused"})
    assert sorted(serve.todo(again)) == [("base", "A"), ("base", "B")]
    options.out.write_text(json.dumps({"class": "A", "status": "fine"}))
    assert serve.todo(options) == []


@pytest.mark.filterwarnings("ignore::heedful.core.errors.InactiveWarning")
def test_the_words_for_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tiny.build("MoshiModel")
    one.model.set_attn_implementation("eager")
    native = tiny.output_tensors(one.forward())
    assert probe._gated(one, None, native) == ("fine", "")
    with monkeypatch.context() as idle:
        idle.setattr(probe, "Gates", probe.Through)
        assert probe._gated(one, None, native)[0] == "wrong"
        idle.setattr(probe, "_reaches", lambda *_: False)
        assert probe._gated(one, None, native) == ("not reached", "")
    layer = one.model.layers[0].self_attn
    del layer.v_proj.linear, layer.o_proj.linear, layer.num_key_value_groups
    assert probe._gated(one, None, native)[0] == "refused"


@pytest.mark.filterwarnings("ignore")  # transformers' own, of a model that does not take eager attention by name
def test_heads_of_what_is_known_once_it_runs_are_measured_by_running_it() -> None:
    assert probe.examine_heads("VitDetModel") == {"status": "fine"}


def test_transformers_takes_timm_for_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for torchvision too, of which no model needs anything."""
    from transformers import utils
    from transformers.utils import import_utils

    for home in (utils, import_utils):
        monkeypatch.setattr(home, "is_timm_available", lambda: False)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: False, "{0} wants timm"))
    with pytest.raises(ImportError, match="wants timm"):
        utils.requires_backends("a model", ["timm"])
    timm_for_transformers()
    utils.requires_backends("a model", ["timm"])
    assert utils.is_timm_available()
    assert import_utils.is_timm_available()
