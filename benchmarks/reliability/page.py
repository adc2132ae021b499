"""Jobs that are killed, files that are damaged, cycles that go on for long, merges of many: measured, and told in docs.

python -m benchmarks.reliability kills 100 | damaged 2000 | soak 500 | merges 1000
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.timing import RECORDS, machine

RECORD = RECORDS / "reliability.json"
ROOT = Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")  # a process that need not import everything again


def load() -> dict[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def _forked(act: Callable[[], Any]) -> Any:
    def alone() -> None:
        os.setsid()
        act()

    process = FORK.Process(target=alone)
    process.start()
    return process


def kills(rounds: int) -> dict[str, Any]:
    """A job over a corpus in one process, killed at random moments until it is done; then another."""
    from heedful.diagnosis import run as running
    from heedful.diagnosis.profile import Profile
    from tests import corpus_job
    from tests.test_corpus import equal

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
            found = Profile.load(out)
            same = all(found.facts[x] == straight.facts[x] for x in ("texts", "tokens", "skipped", "shards"))
            wrong += not (same and equal(found, straight) and job.exitcode == 0)
    return {"kills": killed, "jobs": jobs, "wrong": wrong, "most kills of one job": max(goings)}


def damaged(count: int) -> dict[str, Any]:
    """Files of every kind with something changed in them."""
    from tests import test_damaged as damage

    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        files = damage.files.__wrapped__(_Folders(Path(home)))
        for name in damage.PLANS:
            place = Path(home) / name
            place.mkdir()
            found += damage.outcomes(name, files, place, count // len(damage.PLANS))
            print(name, dict(found), flush=True)
    other = sum(n for word, n in found.items() if word not in ("read", "refused"))
    return {"files": sum(found.values()), "refused": found["refused"], "read": found["read"], "anything else": other}


class _Folders:
    """What pytest calls a factory of folders."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def mktemp(self, name: str) -> Path:
        (self.home / name).mkdir()
        return self.home / name


def soak(cycles: int) -> dict[str, Any]:
    """A reader put on a model and taken off, over and over: what is left of it."""
    import threading

    from heedful import attach, models
    from heedful.facts import fingerprint
    from heedful.methods import AttentionProfile, SinkRate

    model, ids = models.tiny("llama").eval(), torch.arange(5, 37)[None]

    def state() -> tuple[Any, ...]:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return hooks, threading.active_count(), model.config._attn_implementation, fingerprint(model)

    before, memory = state(), []
    began = time.monotonic()
    for i in range(cycles):
        with attach(model, SinkRate() | AttentionProfile()) as run, torch.no_grad():
            run(input_ids=ids)
            run.answers()
        if i in (cycles // 4, cycles - 1):
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
    return {
        "cycles": cycles,
        "seconds": time.monotonic() - began,
        "growth in MB from a quarter on": memory[-1] - memory[0],
        "hooks, threads, config and weights as before": state() == before,
    }


def merges(count: int) -> dict[str, Any]:
    """As many shards as are asked for, merged as the process that leads does it; processor seconds."""
    from heedful import models
    from heedful.core.stats import Mean
    from heedful.diagnosis.corpus import Corpus
    from heedful.diagnosis.measures import DEFAULT
    from heedful.diagnosis.shards import Reader, Sums
    from heedful.diagnosis.workers import packed

    rows = []
    for loaded, times in ((models.load("tiny:llama"), 10 * count), (models.default(), count)):
        with tempfile.TemporaryDirectory() as home:
            (Path(home) / "a.txt").write_text("The keys to the cabinet are on the table. " * 60)
            shard = Corpus(Path(home)).shards()[0]
            words = loaded.tokenizer
            if words is None:
                from tests.test_diagnose_texts import characters

                words = characters()
            piece = Reader(loaded.model, words, DEFAULT, 512, 1, {})(shard)
        sent = packed(piece)
        sums = Sums()
        began = time.process_time()
        for _ in range(times):
            sums = sums.plus(pickle.loads(sent))
        seconds = time.process_time() - began
        key = next(key for key, stat in piece.statistics.items() if type(stat) is Mean)
        one, all_of = (float(x[key].tensors()["count"].double().sum()) for x in (piece.statistics, sums.whole))
        if all_of != times * one:
            raise SystemExit(f"{all_of} is not {times} times {one}")
        rows.append({"model": loaded.name, "profiles": times, "bytes": len(sent), "seconds": seconds})
        print(rows[-1], flush=True)
    return {"rows": rows}


def _where(name: str) -> str:
    found = load()[name]["machine"]
    return (
        f"{found['cpu']}, {found['threads']} thread, load {found['load']}; Python {found['python']}, torch "
        f"{found['torch']}, transformers {found['transformers']}."
    )


def merge_table() -> str:
    """What merges cost."""
    rows = ["| model | profiles | bytes of one | all | each | bar for 10,000: 10 s |", "|---|---:|---:|---:|---:|---|"]
    for row in load()["merges"]["rows"]:
        each = row["seconds"] / row["profiles"]
        told = f"{row['profiles']:,} | {row['bytes']:,} | {row['seconds']:.1f} s | {1000 * each:.2f} ms"
        rows.append(f"| {row['model']} | {told} | {'kept' if 10_000 * each <= 10 else '**missed**'} |")
    return "\n".join([*rows, "", _where("merges")])


TOLD: dict[str, tuple[str, str]] = {
    "kills": (
        "A job over a corpus killed at random moments",
        "One process, `kill -9`, started again until it is done; each finished profile beside that of a job that "
        "nobody killed, bit for bit: statistics, parts, counts and what could not be read. Every shard is saved.",
    ),
    "damaged": (
        "Damaged files",
        "Bits flipped, ends cut off, stretches taken out or put in, values of other kinds, in profiles, statistics and "
        "records: each is read or refused by one of heedful's own errors within 20 s.",
    ),
    "soak": ("A reader put on a model and taken off, over and over", "One forward and its answers each time."),
}


def page() -> str:
    """docs/reliability.md: what was done to it, and what it did."""
    found = load()
    rows = [
        "# Kills, damage, cycles\n",
        "Each was run as often as stands here, by `python -m benchmarks.reliability`, and no oftener.\n",
    ]
    for name, (title, about) in TOLD.items():
        if name in found:
            told = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in found[name].items() if k != "machine"}
            rows += [f"## {title}\n", f"{about}\n", *(f"- {k}: {v}" for k, v in told.items()), f"\n{_where(name)}\n"]
    end = "How corpora are read by many: [scale.md](scale.md)."
    return "\n".join([*rows, "## Merges\n", merge_table(), "", end, ""])


def main() -> None:
    torch.set_num_threads(1)
    for name, count in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        measure = {f.__name__: f for f in (kills, damaged, soak, merges)}[name]
        found = {**measure(int(count)), "machine": machine()}
        RECORD.write_text(json.dumps({**load(), name: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
