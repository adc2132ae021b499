"""The record of coverage: a sweep of some classes replaces their rows alone, and the page tells of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.coverage import page, rows

RELEASES = {"transformers": "5.1.0", "torch": "2.13.0"}
BY_NAME = "refused: a.attn (Own: a softmax), b.attn (Own: a softmax) and c.attn (Other: a mix)"
FIRST: list[dict[str, Any]] = [
    {"class": "B", "group": "base", "status": "refused", "reason": "one | other"},
    {
        "class": "A", "group": "text", "status": "served", "reason": "",
        "eager": {"layers": 3, "entered": 2, "through": {"roundings": 0.0}},
        "sdpa": {"layers": 3, "entered": 2, "through": {"roundings": 1.5}, "unseen": True},
        "generate": {"roundings": 0.5},
    },
    {"class": "C", "group": "base", "status": "refused", "through": False, "reason": BY_NAME},
    {"class": "D", "group": "base", "status": "cannot build", "through": False, "reason": "x" * 200},
    {"class": "Gone", "group": "base", "status": "served", "generate": {"roundings": 0.0}},
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
    again = {"class": "B", "group": "base", "status": "served", "generate": {"roundings": 0.0}}
    return rows.update([again], ["A", "B", "C", "D"])


def test_a_row_is_replaced_and_the_others_stay(record: Path) -> None:
    found = {row.pop("class"): row for row in json.loads(record.read_text())["classes"]}
    assert list(found) == ["A", "B", "C", "D"]  # what transformers does not name any more is gone
    today = found["B"].pop("date")
    assert found.pop("B") == {"group": "base", "status": "served", "generate": 0.0, **RELEASES}
    assert today > "2026-01-02"
    old = {"date": "2026-01-02", "transformers": "5.1.0", "torch": "2.13.0"}
    assert found == {
        "A": old | {
            "group": "text", "status": "served", "layers": [2, 3], "eager": 0.0, "sdpa": 1.5, "generate": 0.5,
            "unseen": True,
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
    assert "| A | served | 2/3 | 0 | 1.5 |" in told
    assert (
        "Of 1 more whose attention is all outside it, 0 are served whole and 0 in part (0.0% together), 1 are" in told
    )
    record.write_text(json.dumps(found | {"classes": [found["classes"][1] | {"date": "2026-01-02"}]}))
    assert "on 2026-01-02, in float32: 1 classes with transformers 5.2.0" in page.page()


def test_a_cell_ends_where_it_should(record: Path) -> None:
    rows.update(FIRST[:1], "AB")
    assert "| refused | one / other | B |" in page.page()
