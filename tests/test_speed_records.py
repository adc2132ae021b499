"""Speed records: a try leaves those of whole runs alone, and one machine's stand beside another's."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.speed import attention, bars, cache, decoding, mechanisms, page, timing
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import HeedfulError
from heedful.core.method import Stack
from heedful.methods import ELA, MALA, NeighborhoodAttention, NoMixing, RectifiedAttention, SigmoidAttention, SinkWindow
from heedful.tiny import tiny, tiny_inputs


@pytest.mark.parametrize("quick", [True, False])
def test_a_try_writes_no_record_of_a_whole_run(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    monkeypatch.setattr(cache, "measure", lambda *_: timing.record("cache", [{"tokens": 1}]))
    monkeypatch.setattr(sys, "argv", ["benchmarks.speed", "cache", *["--quick"] * quick])
    (tmp_path / "cache.json").write_text(whole := '{"machines": []}')
    runpy.run_module("benchmarks.speed", run_name="__main__")
    assert ((tmp_path / "cache.json").read_text() == whole) is quick
    assert (timing.RECORDS / "cache.json").read_text() != whole


def test_what_one_machine_gave_stays_beside_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    here = timing.machine()
    for cpu, seconds in (("Intel(R) Xeon(R) Processor", 1.0), ("AMD EPYC", 2.0), ("Intel(R) Xeon(R) Processor", 3.0)):
        monkeypatch.setattr(timing, "machine", lambda cpu=cpu: {**here, "cpu": cpu})
        timing.record("cache", [{"seconds": seconds}])
    found = [(timing.label(x).split(",")[0], x["rows"][0]["seconds"]) for x in timing.load("cache")]
    assert found == [("AMD EPYC", 2.0), ("Intel Xeon", 3.0)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_what_stands_beside_one_another_is_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW", 5)
    monkeypatch.setattr(attention, "CAP", 2.0)
    monkeypatch.setattr(attention, "compiled", lambda: flex_attention)
    tensors = attention.draw(6, 2, 8, 20, 20, torch.float32)
    plain = attention.ours(attention.Idle(), "tiled", *tensors)()
    for told, torch_s in attention.under(*tensors).values():
        found = attention.ours(attention.Columns(), "tiled", *tensors, **told)()
        assert all(close(found, heads()) for heads in torch_s.values())
        assert not close(found, plain)


def test_a_bar_tells_the_worst_row_that_it_speaks_of() -> None:
    bar = bars.Bar("", 1.0, "x", lambda row: row.get("figure"))
    rows = [
        {"tokens": 10, "figure": 0.5},
        {"tokens": 20, "figure": 1.25},
        {"tokens": 30},
        {"tokens": 40, "figure": 1.5},
    ]
    assert bars.found(bar, {"rows": rows}) == "**1.500**, in 2 of 3: 40 tokens"
    assert bars.found(bar, {"rows": rows[:1]}) == "0.500"
    assert bars.found(bar, {"rows": rows[2:3]}) == ""
    torch_s, ours = {"SDPA": {"seconds": 3.0}, "flex": {"seconds": 2.0}}, {bars.STATISTICS: {"seconds": 1.0}}
    assert bars.quickest("float32")({"type": "float32", "found": torch_s | ours | {"tiled": {"seconds": 0.1}}}) == 0.5
    assert bars.quickest("bfloat16")({"type": "float32", "found": torch_s | ours}) is None
    assert bars.slowest({"tokens": 4096, "found": {"sdpa": {"ratio": 1.0}, "a": {"ratio": 0.5}}}) == 0.5


def test_mechanisms_are_timed_once_and_what_is_foretold_too_long_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    every = {type(m).__name__: m for m in (ELA(), MALA(), NeighborhoodAttention.example())}
    monkeypatch.setattr(mechanisms, "mechanisms", lambda: every)
    mechanisms.measure((16,), 2)
    (told,) = timing.load("mechanisms")
    rows = {row["method"]: row for row in told["rows"]}
    assert [rows[name]["causal"] for name in ("ELA", "MALA", "NeighborhoodAttention")] == [False, True, False]
    assert rows["NeighborhoodAttention"]["density"] < 1
    assert all(row["there"][row["method"]]["seconds"] > 0 for row in told["rows"] if "there" in row)
    mechanisms.measure((16, 64), 2, patience=0.0)
    (again,) = timing.load("mechanisms")
    assert again["rows"][: len(rows)] == told["rows"], "nothing is timed twice"
    assert [row["tokens"] for row in again["rows"] if "foretold" in row.get("why", "")] == [64, 64, 64]
    mechanisms.measure((16, 64), 2)
    (whole,) = timing.load("mechanisms")
    assert sorted(row["tokens"] for row in whole["rows"] if "there" in row)[-3:] == [64, 64, 64]
    assert any("ELA (*both*)" in line for line in page.mechanisms(whole))
    mechanisms.measure((16,), 2, again=("MALA",))
    (other,) = timing.load("mechanisms")
    kept = [[row for row in x["rows"] if (row["method"], row["tokens"]) != ("MALA", 16)] for x in (other, whole)]
    assert kept[0] == kept[1], "what is not named is not timed again"
    lengths = [row["tokens"] for row in other["rows"]]
    assert lengths == sorted(lengths), "who reads them goes by growing lengths"


def test_rows_stay_until_there_are_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures again and is stopped, or can measure no more, has lost nothing but what is out of date."""
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    monkeypatch.setattr(mechanisms, "mechanisms", lambda: {"MALA": MALA()})

    def rows() -> dict[int, dict[str, Any]]:
        return {row["tokens"]: row for row in timing.load("mechanisms")[0]["rows"]}

    def stopped(*given: Any) -> Any:
        if given[3] == 64:
            raise KeyboardInterrupt
        return asked(*given)

    asked = mechanisms.asked
    mechanisms.measure((16, 64), 1)
    before = rows()
    monkeypatch.setattr(mechanisms, "asked", stopped)
    with pytest.raises(KeyboardInterrupt):
        mechanisms.measure((16, 64), 1, again=("MALA",))
    assert rows()[64] == before[64]
    assert rows()[16] != before[16]
    monkeypatch.setattr(mechanisms, "warmed", lambda method, *how: warmed(method, *how) if method is None else never())
    mechanisms.measure((16, 64), 1, again=("MALA",))
    assert [(n, row.get("why")) for n, row in rows().items()] == [(16, "cannot: it is refused now")]


def warmed(method: Any, *how: Any) -> Any:
    return mechanisms.layer(method, *how)


def never() -> Any:
    raise HeedfulError("it is refused now")


def test_mechanisms_take_turns_with_one_softmax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    every = {type(m).__name__: m for m in (MALA(), SigmoidAttention(), RectifiedAttention())}
    monkeypatch.setattr(mechanisms, "mechanisms", lambda: every)
    asked: list[str] = []

    def noted(made: Any, x: Any) -> Any:
        asked.append(str(made.method))
        return there(made, x)

    there = mechanisms.there
    for many, softmaxes in ((3, 1), (1, 3)):
        asked.clear()
        monkeypatch.setattr(mechanisms, "TOGETHER", many)
        monkeypatch.setattr(mechanisms, "there", noted)
        mechanisms.measure((16,), 2, again=tuple(every))
        # each once for nothing and back, softmax once for all; then two turns of both ways
        assert asked.count(str(Stack((RectifiedAttention(),)))) == 2 + 2 * 2
        assert asked.count(str(Stack(()))) == 2 + 2 * 2 * softmaxes
        (told,) = timing.load("mechanisms")
        seconds = {row["there"]["softmax"]["seconds"] for row in told["rows"]}
        assert len(seconds) == softmaxes


def test_what_such_a_layer_takes_without_attention_is_taken_off_a_share() -> None:
    def row(name: str, seconds: float, tokens: int = 64, causal: bool = True) -> dict[str, Any]:
        return {
            "method": name,
            "causal": causal,
            "tokens": tokens,
            "density": 0.25,
            "there": {name: {"seconds": seconds}, "softmax": {"seconds": 5.0}},
        }

    rows = [row("M", 2.0), row("NoMixing", 3.0, 16), row("NoMixing", 0.5, causal=False)]
    rows.append({"method": "NoMixing", "causal": True, "tokens": 64})
    assert page.over_share(rows[0], rows) is None
    assert page.over_share(row("M", 2.0, causal=False), rows) == 1.5 / 4.5 / 0.25
    rows.append(row("NoMixing", 1.0))
    assert page.over_share(rows[0], rows) == 1.0 / 4.0 / 0.25
    rows[-1]["there"]["NoMixing"]["seconds"] = 2.5
    assert page.over_share(rows[0], rows) == 0.0


def test_the_floor_is_timed_in_both_kinds_of_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    monkeypatch.setattr(mechanisms, "mechanisms", lambda: {"NoMixing": NoMixing()})
    mechanisms.measure((16,), 1)
    (told,) = timing.load("mechanisms")
    assert [(row["method"], row["causal"]) for row in told["rows"]] == [("NoMixing", True), ("NoMixing", False)]
    mechanisms.measure((16,), 1)
    assert timing.load("mechanisms")[0]["rows"] == told["rows"], "nothing is timed twice"
    shown = [line.split("|")[1].strip() for line in page.mechanisms(told) if line.startswith("| NoMixing")]
    assert shown == ["NoMixing (*both*)", "NoMixing"]


def test_the_length_from_which_a_mechanism_pays() -> None:
    rows = [
        {"method": "M", "tokens": n, "there": {"M": {"ratio": ratio}, "softmax": {"ratio": 1.0}}}
        for n, ratio in ((16, 0.9), (64, 1.1), (256, 0.8), (1024, 0.4))
    ]
    assert mechanisms.pays(rows, "there") == {"M": 256}
    assert mechanisms.pays(rows[:2], "there") == {"M": None}
    assert mechanisms.pays(rows, "and_back") == {}


def test_a_written_token_is_timed_by_turns_and_its_operations_stand_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    ids = tiny_inputs(model)["input_ids"]
    monkeypatch.setattr(timing, "RECORDS", tmp_path)
    monkeypatch.setattr(models, "default", lambda: (model, None, None))
    monkeypatch.setattr(decoding, "text", lambda _, tokens: ids[:, :tokens])
    monkeypatch.setattr(decoding, "RUNS", {"window": SinkWindow(1, 2)})
    taken = iter((9.0, 9.0, 1.0, 3.0, 2.0, 6.0))  # the first turn warms up
    monkeypatch.setattr(decoding, "seconds", lambda *_: next(taken))
    decoding.measure(8, 2)
    (told,) = timing.load("decoding")
    (row,) = told["rows"]
    found = {name: (x["seconds"], x["ratio"]) for name, x in row["found"].items()}
    assert found == {"plain": (1.5, 1.0), "window": (4.5, 3.0)}
    assert row["added"] == {"window": [*decoding.added(model, ids[:, :8], SinkWindow(1, 2))]}
    row["added"] |= {"window": [29.07, 2.0], "KIVI": [196.5, 10.0]}
    *_, head, _, cells = page.operations(told)
    assert (head, cells) == ("|  | window | KIVI |", "| 8 tokens | 29 (2) | 196 (10) |")


def test_of_a_written_token_the_reading_before_it_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    ids = tiny_inputs(model)["input_ids"][:1, :1].expand(1, decoding.STEPS)
    clock, cached = [0.0], []

    def passed(*given: object, of: float, cache: str) -> str:
        clock[0] += of
        cached.append(given[1] if len(given) > 2 else None)
        return cache

    monkeypatch.setattr(decoding.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(decoding, "read", lambda *given: passed(*given, of=100.0, cache="kept"))
    monkeypatch.setattr(decoding, "step", lambda *given: passed(*given, of=2.0, cache=""))
    assert decoding.seconds(model, ids) == 2.0
    assert cached == [None, *["kept"] * decoding.STEPS]
