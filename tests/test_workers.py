"""Several processes read one corpus: Ray's workers and torch's ranks give the bits that one process gives."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import astuple, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heedful import compare, models
from heedful.bench.comparison import Comparison
from heedful.bench.records import Answered, Refused
from heedful.core.errors import FieldError
from heedful.core.stats import Sum
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.shards import Piece
from heedful.diagnosis.workers import ALIGNED, Ranks, Ray, _closed, _opened, opened, packed
from heedful.methods import BlockAttention, SinkWindow, TempScale
from tests import corpus_job
from tests.apart import APART
from tests.test_corpus import equal
from tests.test_diagnose_texts import characters

HOME = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HOME / 'src'}:{HOME}"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus_job.written(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus: Path) -> Profile:
    """What one process finds, with one thread as each worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return corpus_job.measured(corpus, None)
    finally:
        torch.set_num_threads(threads)


def alike(found: Profile, wanted: Profile) -> None:
    assert equal(found, wanted)
    for fact in ("texts", "windows", "tokens", "left_out", "skipped", "shards", "unread", "backends"):
        assert found.facts[fact] == wanted.facts[fact], fact


def saved(out: Path) -> int:
    """Shards that are safe on disk."""
    try:
        return int(json.loads((out / "unfinished" / "profile.json").read_text())["facts"]["shards"])
    except FileNotFoundError:
        return 0


def waited(process: BaseProcess, out: Path, shards: int, most: float = 200) -> None:
    """Until so many shards are saved, or the process is done."""
    end = time.monotonic() + most
    while process.is_alive() and saved(out) < shards:
        if time.monotonic() > end:
            raise TimeoutError(f"only {saved(out)} shards after {most} s")
        time.sleep(0.02)


def test_two_workers_of_ray_give_what_one_process_gives(corpus: Path, straight: Profile, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    with Ray(2)._cluster():  # one for both: to start it takes longer than all that is done there
        _the_bits_of_one_process(corpus, straight, tmp_path / "profile")
        _the_answers_of_one_process(tmp_path / "answers")
    assert not ray.is_initialized()


def _the_bits_of_one_process(corpus: Path, straight: Profile, out: Path) -> None:
    heard: list[Any] = []
    found = corpus_job.measured(corpus, 2, out, progress=heard.append)
    alike(found, straight)
    alike(Profile.load(out), straight)
    steps = [p.done for p in heard if p.stage == "corpus"]
    assert steps == list(range(straight.facts["shards"] + 1))


def told(found: Comparison) -> list[tuple[Any, ...]]:
    """What was answered, without the times."""
    kept = [replace(x, seconds=0.0) if isinstance(x, Answered) else x for x in found.records]
    return sorted((type(x).__name__, *x.key, *map(str, astuple(x))) for x in kept)


def _the_answers_of_one_process(out: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), characters(), "tiny")
    methods = [SinkWindow(4, 8), TempScale(0.5), BlockAttention(role="nowhere")]
    how: dict[str, Any] = {"prompts": 20, "turns": 0, "minutes": 60.0}
    heard: list[Any] = []
    alone = compare(loaded, methods, ["recall"], **how)
    shared = compare(loaded, methods, ["recall"], workers=2, out=out, progress=heard.append, **how)
    assert told(shared) == told(alone)
    assert {type(x) for x in alone.records} == {Answered, Refused}
    assert told(Comparison.load(out)) == told(alone)
    assert max(p.done for p in heard) == sum(isinstance(x, Answered) for x in alone.records)


def run_by_torch(*words: str, **told: str) -> int:
    """How a script ends in two processes that torch starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *words]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=ENV | told, cwd=HOME, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        return process.wait(200)
    finally:
        process.poll() is None and os.killpg(process.pid, signal.SIGKILL)


def test_two_ranks_give_the_bits_of_one_process(corpus: Path, straight: Profile, tmp_path: Path) -> None:
    assert run_by_torch("tests/corpus_job.py", str(corpus), str(tmp_path / "out"), "ranks") == 0
    alike(Profile.load(tmp_path / "out"), straight)
    alike(Profile.load(tmp_path / "out-of-rank-1"), straight)  # each of them has it all
    assert straight.facts["shards"] % 2, "so that the last round has nothing for one of them"
    told = [(tmp_path / f"out-stopped-{rank}").read_text().splitlines() for rank in (0, 1)]
    wanted = "FieldError corpus_job.done = 2: is enough; for example done=3"
    assert told[0] == [wanted, "KeyboardInterrupt "]
    assert told[1] == [wanted, "HeedfulError the process that leads was stopped by KeyboardInterrupt()"]


def test_ranks_want_a_group(corpus: Path) -> None:
    with pytest.raises(FieldError, match=r"torch.distributed is not initialised: start the script with torchrun"):
        corpus_job.measured(corpus, Ranks())


def test_an_error_of_a_worker_is_the_error_of_the_call() -> None:
    def fail(_: Any) -> Any:
        raise FieldError("diagnose()", "length", 9, "the machine has too little memory", 4)

    content = _closed(fail, None)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"diagnose\(\)\.length = 9: the machine has too little memory; for example"):
        _opened(content)


def test_what_is_sent_arrives_as_it_was() -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    given = {f"{kind} {shape}": Sum(torch.ones(shape).to(kind)) for kind in kinds for shape in ((), (0,), (3, 2))}
    given["turned"] = Sum(torch.rand(3, 2).T)
    given["counted"] = Sum((torch.arange(5.0, dtype=torch.float64) * 9).expand(40, 3, 5).contiguous())
    given["endless"] = Sum(torch.tensor([float("nan"), -float("inf"), -0.0]))
    sent = _closed(lambda _: Piece({"texts": 1}, given), None)  # type: ignore[arg-type]
    assert len(sent) < 8 * given["counted"].total.numel(), "what is alike along an axis is sent once"
    found = _opened(sent)
    assert found.facts == {"texts": 1}
    for key, stat in given.items():
        assert found.statistics[key].total.dtype == stat.total.dtype
        assert torch.equal(found.statistics[key].total.nan_to_num(7), stat.total.nan_to_num(7))
        assert found.statistics[key].total.shape == stat.total.shape
        assert torch.equal((found.statistics[key] + stat).total.nan_to_num(7), (stat + stat).total.nan_to_num(7))


def test_what_is_sent_is_read_where_it_lies(recwarn: pytest.WarningsRecorder) -> None:
    given = {"a": torch.rand(7), "few": torch.arange(70.0).expand(3, 70), "b": torch.rand(11, dtype=torch.float64)}
    content = packed(given)
    found = opened(content)
    assert all(torch.equal(x, given[name]) for name, x in found.items())
    start = np.frombuffer(content, np.uint8).ctypes.data
    places = [x.data_ptr() - start for name, x in found.items() if name != "few"]  # whose whole numbers are made wide
    assert all(0 <= place < len(content) and place % ALIGNED == 0 for place in places)
    assert not recwarn.list


def test_what_the_first_of_the_ranks_says_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own form holds all layers once more for each of them: 125 MB of a profile of 2."""
    sizes: list[int] = []
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list", lambda said, *_: sizes.append(len(pickle.dumps(said)))
    )
    layers = torch.rand(30, 100, dtype=torch.float64).unbind()
    word, found = Ranks()._told(("done", layers))
    assert word == "done"
    assert all(torch.equal(x, y) for x, y in zip(found, layers, strict=True))
    assert sizes[0] < 2 * 30 * 100 * 8


def test_a_cluster_that_does_not_answer_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def nobody(**_: Any) -> None:  # what Ray says after a minute
        raise ConnectionError("Failed to connect to GCS\nat 127.0.0.1:1")

    monkeypatch.setattr(ray, "init", nobody)
    with pytest.raises(FieldError, match=r"Ray\.address = 'auto': no cluster answers there \(Failed to conn"):
        corpus_job.measured(corpus, Ray(address="auto"))


@pytest.mark.parametrize("before", ["", "ray://"])
def test_nobody_waits_for_a_place_where_nobody_listens(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """Ray itself asks again and again, for minutes."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"{before}127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(FieldError, match=rf"Ray\.address = '{where}': no cluster answers there \(.*refused"):
            corpus_job.measured(corpus, Ray(address=where))


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_job_goes_on_and_ends_with_the_same_bits(
    corpus: Path, straight: Profile, tmp_path: Path, at: int
) -> None:
    process = APART.Process(target=corpus_job.main, args=(corpus, tmp_path, "here"))
    process.start()
    try:
        waited(process, tmp_path, at)
        assert process.is_alive(), "it was done before it could be killed"
    finally:
        process.kill()
        process.join()
    before = saved(tmp_path)
    assert before >= at
    heard: list[Any] = []
    torch.set_num_threads(1)
    alike(corpus_job.measured(corpus, None, tmp_path, progress=heard.append), straight)
    assert heard[0].done == before
