"""`heedful compare`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from heedful import models
from heedful.catalogue import entries, in_room, parted, room
from heedful.cli.app import app
from heedful.cli.progress import Bars
from heedful.core.errors import CatalogueError, FieldError, HeedfulError, RefusedModel, UnusableFile
from heedful.core.kinds.conversion import Progress
from heedful.tasks import known

RUN = CliRunner()


class Characters:
    """A tokenizer of as many tokens as the tiny models have."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [3 + ord(letter) % 120 for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(i) for i in ids)

    def __call__(self, text: str, **more: Any) -> dict[str, Any]:
        return {"input_ids": self.encode(text), "offset_mapping": [(i, i + 1) for i in range(len(text))]}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), Characters(), "tiny")
    monkeypatch.setattr(models, "load", lambda name: loaded)
    monkeypatch.chdir(tmp_path)


def test_it_prints_and_writes(tiny: None, tmp_path: Path) -> None:
    arguments = [
        "compare",
        "--methods",
        "sinkwindow(1,8),tempscale(0.5)|sinkwindow(1,8)",
        "--tasks",
        "induction(length=20)",
    ]
    arguments += ["--prompts", "2", "--out", "kept"]
    told = RUN.invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert "SinkWindow(sinks=1, window=8)" in told.output
    assert (tmp_path / "kept" / "page.html").stat().st_size > 100_000
    lines = (tmp_path / "kept" / "records.jsonl").read_text().splitlines()
    again = RUN.invoke(app, [*arguments, "--json", "--no-page"])
    found = json.loads(again.stdout)
    assert {r["contender"] for r in found["results"]} == {"unedited", *found["facts"]["contenders"]}
    assert len([x for x in lines if '"answered"' in x]) == 6
    after = (tmp_path / "kept" / "records.jsonl").read_text().splitlines()
    assert len([x for x in after if '"answered"' in x]) == 6  # nothing was asked twice


def test_commas_inside_brackets_part_nothing() -> None:
    asked = "needle(length=512,depths=(0.0,0.5)), act|pruneheads(groups=((0,0),(1,1)))"
    assert parted(asked) == ["needle(length=512,depths=(0.0,0.5))", "act|pruneheads(groups=((0,0),(1,1)))"]
    assert parted("a(b|c)|d", "|") == ["a(b|c)", "d"]


def test_rarer_settings(tiny: None, tmp_path: Path) -> None:
    arguments = ["compare", "--methods", "sinkwindow(1,8)", "--tasks", "induction(length=20)", "--prompts", "2"]
    arguments += ["--no-page", "--json", "--out", "kept"]
    rarer = ["--seed", "7", "--turns", "0", "--backend", "reference", "--only", "model.layers"]
    told = RUN.invoke(app, [*arguments, *rarer])
    assert told.exit_code == 0, told.exception
    found = json.loads(told.stdout)
    assert found["costs"] == []
    assert found["facts"]["how"] == {"backend": "'reference'", "only": "'model.layers'"}
    records = [json.loads(x) for x in (tmp_path / "kept" / "records.jsonl").read_text().splitlines()]
    assert {r["seed"] for r in records if r["record"] == "answered"} == {7}
    arguments[2] = "loki(rank=0.5)"
    told = RUN.invoke(app, [*arguments[:-2], "--turns", "1", "--fit", "--only", "model.layers.1"])
    assert "tried without a fit" not in told.stderr
    assert json.loads(told.stdout)["costs"]
    assert not json.loads(told.stdout)["refused"]


def test_batches_and_a_limit_of_memory(tiny: None, tmp_path: Path) -> None:
    asked = ["compare", "--methods", "sinkwindow(1,8)", "--tasks", "induction(length=20)", "--prompts", "2"]
    more = ["--turns", "1", "--batch", "1,3", "--cache", "20KB", "--out", "kept"]
    told = RUN.invoke(app, [*asked, *more])
    assert told.exit_code == 0, told.exception
    assert "Within 20 KB of cache, at batch 1 and" in told.stdout
    assert "What each costs by batch" in told.stdout
    found = json.loads(RUN.invoke(app, [*asked, *more, "--json", "--no-page"]).stdout)
    assert [p["batch"] for p in found["costs"]] == [1, 1, 3, 3]
    assert found["facts"]["cache"] == 20 << 10


@pytest.mark.parametrize("wrong", [["--backend", "cuda"], ["--prompts", "1"], ["--only", "nonsense"], ["--tasks", ","]])
def test_bad_input_is_named_before_anything_is_fitted(
    tiny: None, monkeypatch: pytest.MonkeyPatch, wrong: list[str]
) -> None:
    def fitted(*_: Any) -> None:
        raise AssertionError("fitted first")

    monkeypatch.setattr("heedful.bench.fitting.fitted", fitted)
    told = RUN.invoke(app, ["compare", "--methods", "loki", "--tasks", "induction(length=20)", "--fit", *wrong])
    assert isinstance(told.exception, HeedfulError)


def test_where_all_are_refused_it_says_so(tiny: None) -> None:
    told = RUN.invoke(
        app, ["compare", "--methods", "pasta", "--tasks", "loss(length=64)", "--prompts", "2", "--no-page"]
    )
    assert "1 method, 1 task\n" in told.stdout
    assert "None of the methods could be asked." in told.stdout
    assert told.exit_code == 1


def test_methods_for_images_are_refused(tiny: None) -> None:
    told = RUN.invoke(app, ["compare", "--methods", "boq", "--tasks", "induction(length=20)", "--no-page"])
    assert (
        "BoQ was refused on induction: BoQ.subjects = ('image',): it is for images, and these prompts are text"
        in told.stdout
    )
    assert told.exit_code == 1


def test_spans_that_a_task_does_not_mark_are_named(tiny: None) -> None:
    asked = ["compare", "--tasks", "induction(length=20),loss(length=64)", "--prompts", "2", "--no-page"]
    told = RUN.invoke(app, [*asked, "--turns", "1", "--methods", "var,pasta|tempscale,pasta(role='context')"])
    assert told.exit_code == 0, told.exception
    assert "VAR was refused on induction: VAR.role = 'marked': no span in these prompts has that name" in told.stdout
    assert "they mark 'context', 'answer'; for example role='context'" in told.stdout
    assert "when costs were measured" not in told.stdout, "what no task could ask is not measured"
    assert "PASTA | TempScale was refused on induction: PASTA.role" in told.stdout
    assert "PASTA(role='context') was refused on induction" not in told.stdout
    assert "PASTA(role='context') was refused on loss: PASTA.role = 'context'" in told.stdout
    assert "they mark none; try the needle; for example role='needle'" in told.stdout


def test_stopping_says_how_to_go_on(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "__call__", stop)
    asked = ["compare", "--methods", "tempscale", "--tasks", "induction(length=20)", "--prompts", "2"]
    told = RUN.invoke(app, [*asked, "--out", "kept"])
    assert told.exit_code == 130
    assert "stopped; the same command goes on" in told.stderr
    assert RUN.invoke(app, asked).stderr.strip().endswith("stopped")


def test_a_log_is_told_once_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr("heedful.cli.progress.time.perf_counter", lambda: clock[0])
    bars = Bars({"answers": ("asking", "answers")})
    for second in range(0, 150, 10):
        clock[0] = second
        bars(Progress("answers", second, 1500))
    told = capsys.readouterr().err.splitlines()
    assert told == ["asking: 60 of 1,500, 1 answers/s", "asking: 120 of 1,500, 1 answers/s"]
    bars(Progress("answers", 0, 1500, "tiny:llama: as it is called"))
    assert capsys.readouterr().err == "tiny:llama: as it is called\n"
    shown = Bars({"answers": ("asking", "answers")})  # on a terminal the bar itself tells
    shown.console = Console(stderr=True, force_terminal=True)
    clock[0] = 1000.0
    shown(Progress("answers", 1, 1500))
    assert not capsys.readouterr().err


def test_a_log_gets_no_empty_lines_and_whole_notes(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bars({"steps": ("training", "steps")})
    with bars.progress:
        bars(Progress("steps", 1, 2, note := "left out: " + "a long name " * 20))
    assert capsys.readouterr().err == f"{note}\n"


def test_tasks_are_listed() -> None:
    told = RUN.invoke(app, ["compare", "--tasks", "list"])
    assert all(name in told.output for name in known())
    (scenes,) = (line for line in told.output.splitlines() if line.startswith("scenes "))
    assert scenes.endswith("Asked of the model 'denoiser' where none is named.")
    assert told.output.count("where none is named") == 2


def test_scenes_are_drawn_by_the_denoiser_where_no_model_is_named(tmp_path: Path) -> None:
    asked = ["compare", "--methods", "softpag(w=1.0)", "--tasks", "scenes(steps=2),scene_words(steps=2)"]
    told = RUN.invoke(app, [*asked, "--prompts", "2", "--turns", "0", "--no-page", "--json"])
    assert told.exit_code == 0, told.exception
    found = json.loads(told.stdout)
    assert (found["facts"]["model"], found["facts"]["kind"]) == ("the small denoiser", "Denoiser")
    assert {(r["contender"], r["prompts"]) for r in found["results"]} == {("unedited", 2), ("SoftPAG", 2)}
    told = RUN.invoke(app, ["compare", "--methods", "act", "--tasks", "needle,scenes"])
    rule = "compare.--tasks = 'needle,scenes': are for unlike models (default for needle, denoiser for scenes)"
    assert rule in str(told.exception)
    told = RUN.invoke(app, ["compare", "", "--methods", "act", "--tasks", "scenes"])
    assert "no such file or folder" in str(told.exception), "a name that is empty is none that is left out"


def test_scenes_are_no_task_for_a_model_of_texts(tiny: None) -> None:
    told = RUN.invoke(app, ["compare", "tiny", "--methods", "act", "--tasks", "scenes"])
    assert isinstance(told.exception, RefusedModel)
    assert "Llama" in str(told.exception)
    assert "'denoiser', or heedful.models.denoiser()" in str(told.exception)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ([], FieldError, "--methods"),
        (["--methods", "snapvk"], CatalogueError, "SnapKV"),
        (["--methods", "snapkv(budget=7.5)"], FieldError, "budget"),
        (["--methods", "act|prunheads"], CatalogueError, "PruneHeads"),
        (["--methods", "act|pruneheads"], FieldError, "joined"),
        (["--methods", "act", "--tasks", "needel"], CatalogueError, "needle"),
        (
            ["--methods", "act", "--tasks", "nosuch.jsonl"],
            UnusableFile,
            "compare.--tasks = 'nosuch.jsonl': no such file or folder; for example --tasks='my.jsonl'",
        ),
        (["--methods", "act", "--turns", "-1"], FieldError, "turns"),
        (["--methods", "act", "--batch", "1,four"], FieldError, "must be whole numbers, parted by commas"),
        (["--methods", "act", "--batch", "0"], FieldError, "batch"),
        (["--methods", "act", "--cache", "much"], FieldError, "must be a size above 0"),
        (["--methods", "act", "--cache", "4GB", "--turns", "0"], FieldError, "measures no cache"),
        (["--methods", "act", "--backend", "cuda"], FieldError, "must be one of auto"),
        (["--methods", "act", "--preset", "snapkw"], CatalogueError, "sparse-frontier"),
        (["--methods", "act", "--tasks", ","], FieldError, "must name one or more"),
        (["--methods", "act", "--tasks", "needle(length=0)"], FieldError, "length"),
        (["--methods", "act", "--prompts", "1"], FieldError, "must be 2 or more"),
        (["--methods", "act", "--minutes", "0"], FieldError, "minutes"),
        (["--methods", "act", "--margin", "2"], FieldError, "margin"),
        (["--methods", "act", "--out", "a_file"], FieldError, "is a file"),
    ],
)
def test_bad_input_is_named_before_the_model_is_loaded(
    arguments: list[str], error: type[Exception], match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(name: str) -> None:
        raise AssertionError("loaded first")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    told = RUN.invoke(app, ["compare", *arguments])
    assert isinstance(told.exception, error)
    assert match in str(told.exception)


def test_a_model_that_reads_no_words_is_told_another_that_can_be_named() -> None:
    told = RUN.invoke(app, ["compare", "tiny:llama", "--methods", "act"])
    assert str(told.exception).endswith("has no tokenizer or processor, which tasks need; for example MODEL='default'")


def test_workers_are_looked_at_before_the_model_loads() -> None:
    told = RUN.invoke(app, ["compare", "smol", "--methods", "act", "--workers", "0"])
    assert str(told.exception).startswith("Ray.workers = 0: must be 1 or more")


def test_a_room_stands_for_the_methods_in_it() -> None:
    there = {name for name, kind in entries().items() if room(kind) == "sparse/cache"}
    assert set(in_room("sparse/cache")) == there
    assert set(in_room("sparse")) > there
    budgets = in_room("sparse/cache(budget=0.1..0.75)")
    assert {"SnapKV(budget=0.1..0.75)", "KNorm(budget=0.1..0.75)"} <= set(budgets)
    assert not any(one.startswith("KIVI(") for one in budgets), "it has no budget"
    assert "CompositionScore" not in in_room("explain"), "what only reads weights is no contender"
    assert in_room("act") == ["act"]
    for own in ("/home/me/mine.py", "act|../mine.py:Sharpen(factor=2)"):  # a path is no room
        assert in_room(own) == [own]
    assert in_room("snapkv(budget=0.5)") == ["snapkv(budget=0.5)"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sparse/cache(0.25)", r"settings for all of sparse/cache need names; for example .*budget=0\.25"),
        ("observe(budget=0.25)", "no method of observe has budget"),
    ],
)
def test_settings_of_a_room_have_names_that_somebody_there_knows(text: str, told: str) -> None:
    with pytest.raises(FieldError, match=told):
        in_room(text)


def test_a_room_that_is_not_there_says_which_are() -> None:
    with pytest.raises(
        CatalogueError, match=r"no room named 'sparse/cash'\. Did you mean sparse/cache.*There are .*sparse/decode"
    ):
        in_room("sparse/cash(budget=0.25)")


def test_a_room_is_compared_but_for_those_that_do_not_take_its_settings(tiny: None) -> None:
    arguments = ["compare", "--methods", "sparse/decode(budget=8)", "--tasks", "induction(length=20)", "--turns", "0"]
    told = RUN.invoke(app, [*arguments, "--prompts", "2", "--no-page", "--json"])
    assert told.exit_code == 0, told.output
    assert "left out: TokenSelect.budget = 8: must hold the 128 sinks" in told.stderr
    names = {name.partition("(")[0] for name in json.loads(told.stdout)["facts"]["contenders"]}
    left = set(re.findall(r"left out: (\w+)\.budget = 8", told.stderr))
    assert names == {one.partition("(")[0] for one in in_room("sparse/decode(budget=8)")} - left
    assert len(names) >= 2
