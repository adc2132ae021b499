"""Records of a comparison: what is taken, what is refused, and a disk that is full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import models
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.bench.records import FACTS, Answered, Cost, Log, Record, Refused, line, read
from heedful.bench.results import PLAIN
from heedful.core.errors import StatisticError, WriteError
from heedful.core.files import RECORDS
from heedful.diagnosis.run import diagnose
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from tests.test_compare import Echo
from tests.test_files import room_for

IDS = torch.arange(5, 25)


def answered(number: int, seed: int = 0, contender: str = PLAIN) -> Answered:
    return Answered(contender, "t", seed, number, 1.0, -0.5, None, 0.1, True, {"depth": 0.5, "kind": "x"})


RECORD: tuple[Record, ...] = (
    answered(0),
    Cost(PLAIN, 40, "machine", 1, 0.1, 0.2, 5, 6, None, ("native",)),
    Refused("a", "t", "why"),
)


@pytest.mark.parametrize("record", RECORD)
def test_a_record_is_read_as_it_was_written(record: Record, tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text(line(record) + "\n")
    assert read(tmp_path / RECORDS)[1] == [record]


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        (0, "score", float("nan")),
        (0, "score", 1e300),
        (0, "score", True),
        (0, "number", "3"),
        (0, "number", 3.0),
        (0, "active", 1),
        (0, "labels", {"depth": []}),
        (0, "labels", []),
        (0, "contender", None),
        (1, "backends", ["native", 3]),
        (1, "step", 0),
        (1, "peak", 0.5),
        (2, "reason", 5),
    ],
)
def test_values_of_another_kind_are_refused_by_line(record: int, name: str, value: object, tmp_path: Path) -> None:
    found = json.loads(line(RECORD[record])) | {name: value}
    (tmp_path / RECORDS).write_text(f"{line(answered(1))}\n{json.dumps(found)}\n{line(answered(2))}\n")
    with pytest.raises(StatisticError, match=r"records\.jsonl, line 2: no record of a comparison \("):
        read(tmp_path / RECORDS)


ABOUT = {"name": "t", "about": "A.", "unit": "nats", "more_is_better": True}


@pytest.mark.parametrize(
    "facts",
    [
        {"tasks": []},
        {"tasks": {"t": {"name": 3}}},
        {"tasks": {"t": ABOUT | {"left_out": [3]}}},
        {"tasks": {"t": ABOUT | {"told": "a sentence"}}},
        {"contenders": {"a": 1}},
        {"margin": "x"},
        {"margin": 0},
    ],
)
def test_facts_of_another_kind_are_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / RECORDS).write_text(json.dumps({"record": FACTS, **facts}) + "\n" + line(answered(1)) + "\n")
    with pytest.raises(StatisticError, match="line 1: no record"):
        read(tmp_path / RECORDS)


def test_files_that_hold_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(StatisticError, match="cannot read"):
        Comparison.load(tmp_path / "none.jsonl")
    (tmp_path / RECORDS).write_text("")
    with pytest.raises(StatisticError, match="holds no comparison"):
        Comparison.load(tmp_path)
    (tmp_path / RECORDS).write_bytes(b'{"record": "\xff"}\n{}\n')
    with pytest.raises(StatisticError, match="line 1"):
        Comparison.load(tmp_path)


def test_a_line_that_is_whole_but_for_its_newline_is_counted_and_kept(tmp_path: Path) -> None:
    file = tmp_path / RECORDS
    log = Log(file, {}, 0)
    log.add(answered(0))
    log.add(answered(1))
    file.write_text(file.read_text()[:-1])
    again = Log(file, {}, 0)
    again.add(answered(2))
    assert again.found == 2
    assert [r.number for r in read(file)[1] if isinstance(r, Answered)] == [0, 1, 2]


def test_a_full_disk_is_named_and_what_did_not_fit_is_not_counted(tmp_path: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), object(), "tiny")
    options: dict[str, Any] = {"prompts": 4, "turns": 0, "out": tmp_path}
    compare(loaded, [SinkWindow(1, 4)], [Echo()], **{**options, "prompts": 2})
    file = tmp_path / RECORDS
    before = file.read_bytes()
    with room_for(len(before) + 10), pytest.raises(WriteError, match=r"records\.jsonl: File too large"):
        compare(loaded, [SinkWindow(1, 4)], [Echo()], **options)
    assert file.read_bytes() == before
    found = compare(loaded, [SinkWindow(1, 4)], [Echo()], **options)
    assert [r.prompts for r in found.results] == [4, 4]


def test_a_folder_holds_one_seed_and_one_verb(tmp_path: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), object(), "tiny")
    options: dict[str, Any] = {"prompts": 2, "turns": 0}
    compare(loaded, [SinkWindow(1, 4)], [Echo()], out=tmp_path / "c", **options)
    with pytest.raises(StatisticError, match="that seed 0 draws, and this call's seed is 1: name another folder"):
        compare(loaded, [SinkWindow(1, 4)], [Echo()], out=tmp_path / "c", seed=1, **options)
    compare(loaded, [SinkWindow(1, 4)], [Echo()], out=tmp_path / "d", seed=1, **options)
    assert [r.prompts for r in Comparison.load(tmp_path / "c", tmp_path / "d").results] == [4, 4]
    with pytest.raises(StatisticError, match="holds a comparison, and this call makes a diagnosis"):
        diagnose(loaded.model, IDS, out=tmp_path / "c")
    diagnose(loaded.model, IDS, measures="SinkRate", out=tmp_path / "p")
    with pytest.raises(StatisticError, match="holds a diagnosis, and this call makes a comparison"):
        compare(loaded, [SinkWindow(1, 4)], [Echo()], out=tmp_path / "p", **options)
