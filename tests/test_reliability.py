"""What docs/reliability.md tells was measured, and nothing of it went wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import reliability
from heedful.core.errors import HeedfulError
from tests import test_corpus, test_damaged


def test_nothing_of_what_was_done_went_wrong() -> None:
    found = reliability.load()
    assert {"kills", "damaged", "soak", "merges"} <= set(found)
    assert found["kills"]["wrong"] == 0
    assert found["damaged"]["anything else"] == 0
    assert found["soak"]["hooks, threads, config and weights as before"]
    assert found["soak"]["growth in MB from a quarter on"] < 1
    for name, (title, _) in reliability.TOLD.items():
        assert (title in reliability.page()) == (name in found)


def test_what_damage_did_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(folder: Path) -> None:
        text = (folder / "file").read_text()
        if text != "whole":
            raise {"refused": HeedfulError, "broken": KeyError}[text](text)

    def files(folders: Any) -> Path:
        home: Path = folders.mktemp("home")
        (home / "place").mkdir()
        (home / "place" / "file").write_text("whole")
        return home

    def way(word: str) -> tuple[Any, ...]:
        return "place", "file", use, (lambda draw, content: word.encode(),)

    monkeypatch.setattr(test_damaged, "files", SimpleNamespace(__wrapped__=files))
    monkeypatch.setattr(test_damaged, "PLANS", {word: way(word) for word in ("whole", "refused", "broken")})
    assert reliability.damaged(12) == {"files": 12, "refused": 4, "read": 4, "anything else": 4}


@pytest.mark.slow
def test_a_job_that_ends_otherwise_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_corpus, "equal", lambda *_: False)
    found = reliability.kills(1)
    assert found["kills"] == 1
    assert found["wrong"] == found["jobs"] >= 1


@pytest.mark.slow
def test_jobs_killed_at_random_moments_end_with_the_same_bits() -> None:
    found = reliability.kills(20)
    assert found["kills"] == 20
    assert found["wrong"] == 0
