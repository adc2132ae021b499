"""`make gpu`: what it measures on a card is rehearsed here with tiny sizes, and without a card it says so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import keeping, page
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.keeping import REHEARSAL, Kept, Room
from benchmarks.gpu.parts import PARTS, _fastest, table_of
from benchmarks.speed import timing
from heedful.core.mask import Causal
from heedful.core.positions import Pairs, Positions
from heedful.gpu import blocks

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    assert main() == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["make gpu: this machine has no card that torch can use, so nothing is measured"]


def test_a_part_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--rehearse", "speed"])
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which a rehearsal sets
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "no such part: speed" in capsys.readouterr().err


def rehearsed(parts: tuple[str, ...], tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The records of some parts, and the page made of them."""
    before = {path: path.read_bytes() for path in timing.RECORDS.glob("gpu_*.json")}
    code = f"""
import sys
from pathlib import Path
sys.argv = ["benchmarks.gpu", "--rehearse", "--budget", "3000", *{parts!r}]
from benchmarks.speed import timing
def apart():
    timing.RECORDS = Path({str(tmp_path)!r})
timing.apart = apart
from benchmarks.gpu.__main__ import main
code = main()
from benchmarks.gpu import page
(Path({str(tmp_path)!r}) / "page.md").write_text(page.page())
sys.exit(code)
"""
    # in a process of its own, since kernels are interpreted, or not, from their import on
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    assert before == {path: path.read_bytes() for path in timing.RECORDS.glob("gpu_*.json")}
    return {path.stem.removeprefix("gpu_"): json.loads(path.read_text()) for path in tmp_path.glob("gpu_*.json")}


def test_speed_is_rehearsed(tmp_path: Path) -> None:
    parts = "tune", "decode", "prefill", "diagnose"
    found = rehearsed(parts, tmp_path)
    assert set(found) == set(parts)
    assert all("rehearsal" in record["facts"]["card"] for record in found.values())
    rows = {name: record["rows"] for name, record in found.items()}
    assert [row["tokens"] for row in rows["diagnose"]] == list(REHEARSAL.lengths)
    assert [row["tokens"] for row in rows["prefill"]] == list(REHEARSAL.prefill)
    assert [row["batch"] for row in rows["decode"]] == list(REHEARSAL.batches)
    assert [row["kind"] for row in rows["tune"]] == ["rows", "back", "step"]
    assert len(rows["tune"][0]["found"]) == 1 + len(REHEARSAL.sizes)
    (row,) = rows["prefill"]
    assert set(row["over_density"]) == set(row["density"]) == set(row["found"]) - {"SDPA, dense"}
    assert all(0.5 <= share <= 1 for share in row["density"].values()), "half of two blocks is their diagonal"
    text = (tmp_path / "page.md").read_text()
    assert "no card: a rehearsal" in text
    assert "Sparse prefill" in text


@pytest.mark.slow
def test_speed_is_rehearsed_where_the_cpu_s_tensors_are_refused(tmp_path: Path) -> None:
    parts = "tune", "decode", "prefill", "diagnose"
    command = [sys.executable, "-m", "tests.card_job", str(tmp_path), *parts]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    assert {json.loads((tmp_path / f"gpu_{part}.json").read_text())["rows"] != [] for part in parts} == {True}


@pytest.mark.slow
def test_laws_and_kernel_tests_are_rehearsed(tmp_path: Path) -> None:
    found = rehearsed(("laws", "kernels"), tmp_path)
    assert len(found["laws"]["rows"]) == REHEARSAL.methods
    assert not any(row["broken"] for row in found["laws"]["rows"])
    assert "passed" in found["kernels"]["rows"][0]["outcome"]
    assert not found["kernels"]["rows"][0]["stopped"]
    text = (tmp_path / "page.md").read_text()
    assert f"{REHEARSAL.methods} methods were tried; 0 break a law there." in text


def test_density_is_that_of_the_table() -> None:
    rule, density = table_of(Room(CPU, REHEARSAL, time.monotonic()), 192, 0.4)
    row = Positions.row(0, 192)
    pairs = Pairs(row, row, REHEARSAL.shape[0], slice(0, 192), slice(0, 192))
    seen = (rule.keeps(pairs) & Causal().keeps(pairs)).double().mean((0, 1)).sum()
    assert float(seen) / (192 * 193 / 2) == pytest.approx(density)


def test_rows_are_kept_as_they_come_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    kept = Kept("decode", CPU)
    kept.add({"batch": 1, "found": {}})
    assert Kept("decode", CPU).has(batch=1)
    assert not Kept("decode", CPU).has(batch=16)
    assert not Kept("decode", CPU).whole
    assert not Kept("decode", CPU, again=True).rows
    monkeypatch.setattr(keeping, "sources", lambda: "others")
    assert not Kept("decode", CPU).rows


def test_nothing_new_is_begun_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    late = Room(CPU, REHEARSAL, time.monotonic() - 1)
    for name, (_, measure) in PARTS.items():
        kept = Kept(name, CPU)
        measure(kept, late)
        assert not kept.rows, name
    assert len(late.race({"a": list, "b": list})["found"]) == 2
    assert sum(share for share, _ in PARTS.values()) == pytest.approx(1.0)


def test_sizes_that_time_was_too_short_for_are_no_record() -> None:
    late = Room(CPU, REHEARSAL, time.monotonic() - 1)
    assert _fastest("rows", 16, list, late) is None


def test_without_records_the_page_claims_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    text = page.page()
    assert "**Not measured**" in text
    assert text.count("| not measured |") == len(page.BARS)


def test_bars_are_held_against_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    kept = Kept("diagnose", CPU)
    for tokens, ratio in ((2048, 1.1), (8192, 1.3)):
        found = {name: {"seconds": x, "ratio": x, "quartiles": [x, x]} for name, x in
                 (("plain forward", 1.0), ("default diagnose", ratio))}  # fmt: skip
        kept.add({"tokens": tokens, "found": found, "peak_mb": {"plain forward": 100.0, "default diagnose": 109.0}})
    told = [row for row in page.verdicts() if "diagnose" in row or "peak memory" in row]
    assert told[0].endswith("| 1.15 | 1.300 | **no**, in 1 of 2 |")
    assert told[1].endswith("| 1.10 | 1.090 | yes |")


def test_kernel_tests_that_fail_or_are_stopped_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    told: list[Any] = [
        "FAILED tests/a.py::b - no\n1 failed in 2s",
        subprocess.TimeoutExpired("pytest", 1.0),
        "1 passed",
    ]

    def run(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        found = told.pop(0)
        if isinstance(found, Exception):
            raise found
        return subprocess.CompletedProcess(command, "failed" in found, found, "")

    monkeypatch.setattr(subprocess, "run", run)
    room, kept = Room(CPU, replace(REHEARSAL, tests=("a", "b")), time.monotonic() + 60), Kept("kernels", CPU)
    PARTS["kernels"][1](kept, room)
    assert [(row["failed"], row["stopped"]) for row in kept.rows] == [(["tests/a.py::b"], False), ([], True)]
    PARTS["kernels"][1](kept, room)
    assert [row["outcome"] for row in kept.rows] == ["1 failed in 2s", "1 passed"]


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card of which nothing is asked but its name, and a table of block sizes of its own."""
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    monkeypatch.setattr(blocks, "TABLE", tmp_path / "tuned.json")
    blocks.TABLE.write_text("{}")
    blocks.table.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--budget", "100"])
    return tmp_path


def test_what_is_fastest_goes_into_the_table_and_is_taken(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(kept: Kept, room: Room) -> None:
        kept.add({"kind": "rows", "width": 64, "best": [128, 64, 8, 3]})
        kept.add({"kind": "step", "width": 64, "best": None})

    monkeypatch.setattr("benchmarks.gpu.parts.PARTS", {"tune": (1.0, tune)})
    assert main() == 0
    assert json.loads(blocks.TABLE.read_text()) == {"sm_90": {"rows": {"64": [128, 64, 8, 3]}}}
    monkeypatch.setattr(blocks, "architecture", lambda device: "sm_90")
    narrow = torch.empty(0, dtype=torch.bfloat16)
    assert blocks.tiles("rows", 64, 4096, narrow) == blocks.Tiles(128, 64, 8, 3, tuned=True)
    blocks.table.cache_clear()


def test_a_part_that_fails_takes_nothing_from_the_others_and_time_is_divided(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    began, until = time.monotonic(), {}

    def part(kept: Kept, room: Room) -> None:
        until[kept.part] = room.until - began
        kept.add({"row": 1})
        if kept.part == "a":
            raise MemoryError("too small a card")

    monkeypatch.setattr("benchmarks.gpu.parts.PARTS", {"a": (0.25, part), "b": (0.75, part)})
    assert main() == 1
    assert until == {"a": pytest.approx(25, abs=5), "b": pytest.approx(100, abs=5)}
    assert "a: MemoryError: too small a card" in capsys.readouterr().err
    told = {name: keeping.read(name) for name in ("a", "b")}
    assert [x["whole"] for x in told.values() if x] == [False, True]
    assert all(x["rows"] == [{"row": 1}] and x["facts"]["card"] == "a card" for x in told.values() if x)


def test_memory_is_told_of_a_card_and_all_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: asked.append("waits"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append("forgets"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    room = Room(torch.device("cuda:0"), REHEARSAL, time.monotonic() + 60)
    row = room.race({"a": lambda: asked.append("a"), "b": lambda: asked.append("b")})
    assert row["peak_mb"] == {"a": 3.0, "b": 3.0}
    assert asked[:6] == ["forgets", "a", "waits", "forgets", "b", "waits"]
    assert asked[6:] == ["waits", "a", "waits", "waits", "b", "waits"]
