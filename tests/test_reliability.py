"""What docs/reliability.md tells was measured, and nothing of it went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.reliability import damaged, kills, merges, page, soak
from heedful.core.errors import HeedfulError
from heedful.core.method import as_stack
from heedful.methods import TempScale
from tests import test_corpus, test_damaged


def test_nothing_of_what_was_done_went_wrong() -> None:
    found = page.load()
    assert {*page.TOLD, "merges", "simulated"} - {"two_workers"} <= set(found)  # which wants an idle machine
    assert found["kills"]["wrong"] == found["ray_kills"]["wrong"] == 0
    assert sum(found["ray_kills"]["kills"].values()) >= 30
    assert found["damaged"]["anything else"] == 0
    assert found["damaged"]["files"] >= 100_000
    assert found["mixed"]["errors that are not heedful's own"] == {}
    assert found["mixed"]["models changed"] == 0
    assert found["mixed"]["interrupts that hit"] >= 200
    assert found["checkpoints"]["share of the time, at one every 60 s"] <= 0.02
    assert found["soak"]["hooks, threads, config and weights as before"]
    assert found["soak"]["growth in MB from a quarter on"] < 1
    for name, (title, _) in page.TOLD.items():
        assert (title in page.page()) == (name in found)


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
    assert damaged.damaged(12) == {"files": 12, "refused": 4, "read": 4, "anything else": 4}


@pytest.mark.slow
def test_a_job_that_ends_otherwise_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_corpus, "equal", lambda *_: False)
    found = kills.kills(1)
    assert found["kills"] == 1
    assert found["wrong"] == found["jobs"] >= 1


@pytest.mark.slow
def test_jobs_killed_at_random_moments_end_with_the_same_bits() -> None:
    found = kills.kills(20)
    assert found["kills"] == 20
    assert found["wrong"] == 0


@pytest.mark.slow
def test_two_workers_of_ray_killed_at_random_moments_end_with_the_same_bits() -> None:
    pytest.importorskip("ray")
    found = kills.ray_kills(3)
    assert sum(found["kills"].values()) == 3
    assert found["wrong"] == found["processes that outlived their driver by 120 s"] == 0


def test_what_outlives_a_process_is_counted_and_ended() -> None:
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        process.stdout.readline()
        found = kills.below(process.pid)
        assert [name.split()[0] for name in found.values()] == ["sleep"]
        assert process.pid in kills.below(os.getpid())
    finally:
        process.kill()
        process.wait()
        process.stdout and process.stdout.close()
    assert kills.outlived(set(found), 0.2) == 1
    assert kills.outlived(set(found)) == 0


def test_what_goes_wrong_in_a_mixed_run_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Linear):
        config = None

    class Job(soak.Job):
        kinds = ("a",)

        def __post_init__(self) -> None:
            self.models = {"a": self.made("a")}

        def made(self, kind: str) -> Any:
            return SimpleNamespace(model=Model(2, 2))

    def hook(job: soak.Job) -> None:
        job.models["a"].model.register_forward_hook(lambda *_: None)

    def refuse(_: soak.Job) -> None:
        raise HeedfulError("no")

    def fail(_: soak.Job) -> None:
        raise KeyError("oh")

    for what, wanted in ((hook, (1, 0, 0)), (refuse, (0, 1, 0)), (fail, (0, 0, 1)), (str, (0, 0, 0))):
        monkeypatch.setattr(soak, "Job", Job)
        monkeypatch.setattr(soak, "ACTS", {"it": (what, 1)})
        clock = iter(range(100))
        monkeypatch.setattr(soak.time, "monotonic", lambda clock=clock: float(next(clock)))
        found = soak.mixed(2)
        assert found["done"] == {"it": 1}
        counted = (found["models changed"], found["refused"], len(found["errors that are not heedful's own"]))
        assert counted == wanted


def test_growth_is_seen_from_a_quarter_on() -> None:
    hours = [i / 10 for i in range(11)]
    rows = [5.0 * h if h < 0.25 else 9.0 + 2 * h for h in hours]
    whole = [round(x) for x in rows]
    watch = soak.Watch([3600 * h for h in hours], rows, whole, whole, whole, rows)
    found = watch.told(3600)
    assert found["growth in MB an hour from a quarter on"] == pytest.approx(2)
    assert found["highest memory in MB"] == 11
    assert found["memory in MB, after a quarter of the time and in the end"] == [pytest.approx(9.6), 11]
    assert len(found["memory in MB at each tenth of the time"]) == 10


def test_an_interrupt_comes_at_the_line_it_is_meant_for() -> None:
    assert not soak.interrupted(10**9, lambda: as_stack(TempScale(0.5)))
    assert soak.interrupted(2, lambda: as_stack(TempScale(0.5)))
    assert sys.gettrace() is None


def test_a_simulation_is_bound_by_workers_and_by_merges() -> None:
    alone = merges._simulated(1, 50, 10.0, 0.001)
    assert alone["hours"] == pytest.approx(50 * 10 / 3600, rel=0.6)
    assert alone["most profiles that wait"] == 1
    many = merges._simulated(1000, 2000, 1.0, 0.01)
    assert many["hours"] == pytest.approx(2000 * 0.01 / 3600, rel=0.1), "merges are all of the time"
    assert many["busy"] > 0.9
    assert many["most profiles that wait"] > 100
