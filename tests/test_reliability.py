"""What docs/reliability.md tells was measured, and nothing of it went wrong."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.reliability import damaged, kills, merges, numbers, page, problems, soak
from heedful.core.errors import HeedfulError
from heedful.core.method import as_stack
from heedful.engine.backends import native as backend
from heedful.methods import TempScale
from tests import test_corpus, test_damaged


def test_nothing_of_what_was_done_went_wrong() -> None:
    found = page.load()
    assert {*page.TOLD, "merges", "numbers"} <= set(found)
    assert found["kills"]["wrong"] == found["ray_kills"]["wrong"] == 0
    assert found["kills"]["kills"] >= 100
    assert found["ray_kills"]["kills, all"] == sum(found["ray_kills"]["kills"].values()) >= 100
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


def test_two_workers_were_measured_where_nothing_else_ran() -> None:
    found = page.load()["two_workers"]
    assert found["load before it"] < 0.5
    assert found["ratio, median"] >= 1.6


def test_random_problems_were_computed_under_the_sanitizers() -> None:
    found = page.load()["sanitized"]
    assert found["problems"] >= 30_000
    told = ("reports of a sanitizer, or a process that died", problems.SEVERAL, problems.EXACT)
    assert [found[what] for what in told] == [0, 0, 0]


def test_the_kernels_numbers_are_as_near_as_torchs() -> None:
    rows = page.load()["numbers"]["rows"]
    assert {(row["case"], row["dtype"]) for row in rows} == set(itertools.product(numbers.CASES, numbers.DTYPES))
    for row in rows:
        for word in ("median", "99.9 %", "worst"):
            assert row["native"][word] <= 2 * row["torch"][word], row


def test_a_number_that_is_off_is_seen() -> None:
    found = numbers.numbers(1, lambda *_: {"native": torch.tensor([0.0, 0.0, 3.0]), "torch": torch.zeros(3)})
    assert all(row["native"] == {"median": 0, "99.9 %": 3, "worst": 3} for row in found["rows"])
    assert all(row["torch"]["worst"] == 0 for row in found["rows"])


@pytest.mark.parametrize("name", numbers.CASES)
def test_both_kernels_compute_what_float64_does(name: str) -> None:
    """Another mask, bias or cap in any of the three would be far off."""
    case = numbers.CASES[name]
    small = replace(case, shape=(*case.shape[:3], min(case.shape[3], 40), min(case.shape[4], 50), *case.shape[5:]))
    for who, far in numbers.gaps(small, torch.float32, 1).items():
        assert float(far.max()) < 1e-3, who


def test_random_problems_hold_and_a_fault_in_one_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    told = sum((problems.Problem(number).complaints() for number in range(12)), Counter())
    assert told[problems.SEVERAL] == told[problems.EXACT] == 0
    assert told.total() == 12
    plain = backend.computed

    def off(kernel: Any, job: Any, *given: Any) -> Any:
        heads = plain(kernel, job, *given)
        return heads * (1 + (torch.get_num_threads() > 1) * 0.02)

    monkeypatch.setattr(backend, "computed", off)
    assert problems.Problem(3).complaints()[problems.SEVERAL] == 1
    shown: set[int] = set()

    def wrong(*given: Any) -> Any:
        heads = plain(*given)
        shown.update([number] if heads.any() else [])
        return heads * 1.05

    monkeypatch.setattr(backend, "computed", wrong)
    found: Counter[str] = Counter()
    for number in range(10):
        found += problems.Problem(number).complaints()
    assert found[problems.SEVERAL] == 0
    assert found[problems.EXACT] == len(shown) > 7, "where no row sees anything there is nothing to be wrong"


@pytest.mark.slow
def test_problems_under_the_sanitizers_and_what_they_report(tmp_path: Path) -> None:
    told = problems.sanitizing(tmp_path)
    found, died = problems.asked(0, 200, told)
    assert died == found[problems.SEVERAL] == found[problems.EXACT] == 0
    assert sum(n for word, n in found.items() if word.startswith("on ")) == 200
    beyond = "import torch\nfrom tests.kernel_calls import *\nq, k, v = draw((1, 2, 2, 40, 40, 8, 8))\n" + (
        "k = k[:, :, :1].clone().as_strided(k.shape, k.stride()) if {} else k\n"
        "run('native', Same(), q, k, v, a_call((1, 2, 2, 40, 40, 8, 8), CAUSAL))"
    )
    for planted, ends in ((False, True), (True, False)):
        words = [sys.executable, "-c", beyond.replace("{}", str(planted))]
        env = {**os.environ, **told, "PYTHONPATH": f"{problems.ROOT / 'src'}:{problems.ROOT}"}
        done = subprocess.run(words, env=env, cwd=problems.ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == ends, done.stderr[-2000:]
        assert ends or "AddressSanitizer" in done.stderr


@pytest.mark.slow
def test_thirty_thousand_problems_under_the_sanitizers() -> None:
    *_, found = problems.sanitized(30_000, {})
    assert found["problems"] == sum(found["problems on each path"].values()) == 30_000
    told = ("reports of a sanitizer, or a process that died", problems.SEVERAL, problems.EXACT)
    assert [found[what] for what in told] == [0, 0, 0]


def test_what_runs_found_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = iter([(Counter({"on a": 250}), 0), (Counter(), 1), (Counter({"on a": 9, problems.EXACT: 2}), 0)])
    monkeypatch.setattr(problems, "sanitizing", lambda _: {})
    monkeypatch.setattr(problems, "asked", lambda *_: next(asked))
    *_, first = problems.sanitized(500, {})
    (second,) = problems.sanitized(9, first)
    assert second["problems"] == 509
    assert second["reports of a sanitizer, or a process that died"] == 1
    assert (second[problems.SEVERAL], second[problems.EXACT]) == (0, 2)
    assert second["problems on each path"] == {"a": 259}


def test_kills_of_several_runs_add_up_and_each_is_told() -> None:
    run = {"jobs": 2, "wrong": 1, "drivers looked after": 3, "processes left": 1, "ended": False, "folders left": None}
    once = kills._added({}, run | {"kills": {"a worker": 2}})
    twice = kills._added(once, run | {"kills": {"the driver": 3}, "ended": True, "folders left": ["a"]})
    assert twice["kills"] == {"a worker": 2, "the driver": 3}
    assert (twice["kills, all"], twice["jobs"], twice["wrong"], twice["runs"], len(twice["each"])) == (5, 4, 2, 2, 2)
    assert twice["runs cut off by a limit of time, of which jobs that had ended are counted"] == 1
    assert twice["processes that outlived their driver by 120 s, in 6 kills"] == 2
    assert twice["folders left in the end"] == 1
    assert "- each: " not in page.page()


def test_what_was_killed_is_looked_after_when_its_time_is_over() -> None:
    now = time.monotonic()
    waits: list[tuple[set[int], float]] = [({2**30}, now - 1), ({2**30}, now + 60)]
    assert kills.due(waits) == (1, 0)
    assert len(waits) == 1
    assert kills.due(waits, all_of_them=True) == (1, 0)
    assert not waits


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
    *_, found = kills.ray_kills(3, {})
    assert found["kills, all"] == 3
    (run,) = found["each"]
    assert run["ended"]
    assert run["wrong"] == run["processes left"] == 0


def test_what_outlives_a_process_is_counted_and_ended() -> None:
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60']); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        process.stdout.readline()
        ends = time.monotonic() + 10
        while not all((found := kills.below(process.pid)).values()) and time.monotonic() < ends:
            time.sleep(0.01)  # a process that has just begun has no name yet
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


def test_the_page_simulates_with_the_merge_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"seconds": 100.0, "profiles": 10_000, "bytes": 1_000_000}
    monkeypatch.setattr(page, "load", lambda: {"merges": {"rows": [slow | {"seconds": 1.0}, slow]}})
    told = page.simulation()
    assert "10.00 ms for a merge, 1,000,000 bytes for a profile" in told
    assert "| 1,000 | 6 s | 0.03 |" in told, "10,000 merges of 10 ms are all of the time"
