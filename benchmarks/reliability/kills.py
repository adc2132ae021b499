"""Jobs over a corpus that are killed at random moments, and started again until they are done."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

FORK = multiprocessing.get_context("fork")  # a process that need not import everything again
KINDS = _, WORKER, ALL = "the driver", "a worker", "all of them"
PATIENCE = 120.0  # seconds in which what a driver had started must be gone: Ray's agents look for it for 60


def _forked(act: Callable[[], Any]) -> Any:
    def alone() -> None:
        os.setsid()
        act()

    process = FORK.Process(target=alone)
    process.start()
    return process


def _wrong(out: Path, straight: Any) -> bool:
    """Whether a job that is done says anything else than one that nobody killed."""
    from heedful.diagnosis.profile import Profile
    from tests.test_corpus import equal

    found = Profile.load(out)
    facts = ("texts", "windows", "tokens", "left_out", "skipped", "shards", "unread")
    return not (equal(found, straight) and all(found.facts[x] == straight.facts[x] for x in facts))


def kills(rounds: int) -> dict[str, Any]:
    """A job over a corpus in one process, killed at random moments until it is done; then another."""
    from heedful.diagnosis import run as running
    from tests import corpus_job

    running.SAVE_EVERY = 0.0
    draw, killed, jobs, wrong, goings = random.Random(0), 0, 0, 0, []
    with tempfile.TemporaryDirectory() as home:
        corpus = corpus_job.written(Path(home), 60)
        straight = corpus_job.measured(corpus, None)
        began = time.monotonic()
        whole = _forked(lambda: corpus_job.measured(corpus, None, Path(home) / "timed", progress=corpus_job.slowly))
        whole.join()
        takes = time.monotonic() - began
        while killed < rounds:
            out, hits = Path(home) / f"out{jobs}", 0
            while True:
                job = _forked(lambda out=out: corpus_job.measured(corpus, None, out, progress=corpus_job.slowly))
                job.join(draw.uniform(0, takes / 2) if killed < rounds else None)
                if job.exitcode is not None:
                    break
                os.kill(job.pid, signal.SIGKILL)
                job.join()
                killed, hits = killed + 1, hits + 1
                print(f"{killed} kills, {jobs} jobs, {wrong} wrong", flush=True)
            jobs += 1
            goings.append(hits)
            wrong += _wrong(out, straight) or job.exitcode != 0
    return {"kills": killed, "jobs": jobs, "wrong": wrong, "most kills of one job": max(goings)}


def below(pid: int) -> dict[int, str]:
    """All processes that one started, and those that these did, by what they call themselves."""
    parents, names = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(place.name)] = _named(int(place.name))
        except OSError:
            continue  # it has ended meanwhile
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return {number: names[number] for number in found}


def _named(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def outlived(pids: set[int], seconds: float = PATIENCE) -> int:
    """How many of these are there still after so many seconds, or as soon as none is."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if _lives(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with suppress(OSError):  # it may end at last
            print(f"{pid} is there after {seconds} s: {_named(pid)}", flush=True)
            os.kill(pid, signal.SIGKILL)
    return len(left)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class _RayJob:
    """A job of two workers of Ray in a process of its own, with a folder of its own for what Ray writes."""

    def __init__(self, corpus: Path, out: Path, scratch: Path) -> None:
        from tests import corpus_job

        def act() -> None:
            tempfile.tempdir = str(scratch)
            corpus_job.measured(corpus, 2, out, progress=corpus_job.slowly)

        self.process = _forked(act)

    def ended(self, seconds: float | None) -> bool:
        """Whether it ends within so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def kill(self, what: str, draw: random.Random) -> tuple[bool, set[int]]:
        """Kill the driver, a worker, or all: whether there was one, and what the driver had started."""
        started = below(self.process.pid)
        if what == WORKER:
            workers = [pid for pid, name in started.items() if "MapBatches" in name or "MapWorker" in name]
            if workers:
                os.kill(draw.choice(workers), signal.SIGKILL)
            return bool(workers), set(started)
        for pid in (self.process.pid, *(started if what == ALL else ())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join()
        return True, set(started)


def due(waits: list[tuple[set[int], float]], all_of_them: bool = False) -> tuple[int, int]:
    """Of those whose time is over, or of all, how many kills and how many processes that are there still."""
    now = time.monotonic()
    ready = [(pids, end) for pids, end in waits if all_of_them or end <= now]
    waits[:] = [one for one in waits if one not in ready]
    return len(ready), sum(outlived(pids, end - time.monotonic()) for pids, end in ready)


def ray_kills(rounds: int, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Jobs of two workers of Ray, of which the driver, a worker or all are killed: so many kills more, by jobs."""
    from heedful.diagnosis import run as running
    from tests import corpus_job

    running.SAVE_EVERY = 0.0
    mine: dict[str, Any] = {"began": time.strftime("%Y-%m-%d %H:%M"), "jobs": 0, "wrong": 0, "ended": False}
    draw, hit, waits = random.Random(mine["began"]), Counter[str](), list[tuple[set[int], float]]()
    seen, left = 0, 0  # kills of a driver after which was looked long enough, and processes that were there still
    with tempfile.TemporaryDirectory(prefix="k") as home:
        corpus, scratch = corpus_job.written(Path(home), 100), Path(home) / "s"
        scratch.mkdir()
        straight = corpus_job.measured(corpus, None)
        began, takes = time.monotonic(), 0.0
        job = _RayJob(corpus, Path(home) / "out0", scratch)
        try:
            while hit.total() < rounds or not takes:
                out = Path(home) / f"out{mine['jobs']}"  # the first job is killed by nobody: how long does one take?
                while not job.ended(draw.uniform(0, takes) if takes and hit.total() < rounds else None):
                    what = draw.choice(KINDS)
                    there, started = job.kill(what, draw)
                    hit[what] += there
                    if what != WORKER:
                        waits.append((started, time.monotonic() + PATIENCE))
                        job = _RayJob(corpus, out, scratch)
                    print(f"{dict(hit)}, {mine['jobs']} jobs of {takes:.0f} s, {mine['wrong']} wrong", flush=True)
                takes = takes or time.monotonic() - began
                mine["jobs"] += 1
                mine["wrong"] += job.process.exitcode != 0 or _wrong(out, straight)
                last = hit.total() >= rounds
                now, more = due(waits, last)
                seen, left = seen + now, left + more
                mine |= {"kills": dict(hit), "drivers looked after": seen, "processes left": left, "ended": last}
                mine["folders left"] = [path.name for path in scratch.iterdir()] if last else None
                yield _added(before, mine)
                if not last:
                    job = _RayJob(corpus, Path(home) / f"out{mine['jobs']}", scratch)
        finally:
            if not job.ended(0):
                job.kill(ALL, draw)


def _added(before: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """What all runs found, and each for itself."""
    each = [*before.get("each", ()), dict(mine)]
    own = [run for run in each if "put together" not in run]
    old = {key: x for run in each if "put together" in run for key, x in run["processes left"].items()}
    hit = sum((Counter(run["kills"]) for run in each), Counter())
    seen, left = (sum(run[key] for run in own) for key in ("drivers looked after", "processes left"))
    return {
        "kills": dict(hit),
        "kills, all": hit.total(),
        "jobs": sum(run["jobs"] for run in each),
        "wrong": sum(run["wrong"] for run in each),
        "runs": sum(run.get("put together", 1) for run in each),
        "runs cut off by a limit of time, of which jobs that had ended are counted": sum(not x["ended"] for x in own),
        **old,
        f"processes that outlived their driver by {PATIENCE:.0f} s, in {seen} kills": left,
        "folders left in the end": sum(len(run["folders left"] or ()) for run in each),
        "each": each,
    }
