"""A try of a benchmark leaves the records of whole runs alone."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.speed import cache, timing


@pytest.mark.parametrize("quick", [True, False])
def test_a_try_writes_no_record_of_a_whole_run(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    monkeypatch.setattr(cache, "measure", lambda *_: timing.record("cache", [{"tokens": 1}]))
    monkeypatch.setattr(sys, "argv", ["benchmarks.speed", "cache", *["--quick"] * quick])
    (tmp_path / "cache.json").write_text("whole")
    runpy.run_module("benchmarks.speed", run_name="__main__")
    assert ((tmp_path / "cache.json").read_text() == "whole") is quick
    assert (timing.RECORDS / "cache.json").read_text() != "whole"
