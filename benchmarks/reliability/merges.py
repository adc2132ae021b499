"""What it costs to share a corpus among many: merges, saves, a thousand workers, and two of them beside one."""

from __future__ import annotations

import heapq
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heedful.core.kinds.conversion import Progress
from heedful.diagnosis.shards import Piece
from heedful.diagnosis.workers import Pieces, Ray, Read, Workers

MINUTES = 8  # that two workers and one are measured for at most
LINK = 1e9  # bytes a second that reach the process that leads
SENTENCE = "The keys to the cabinet are on the table. "


def _piece(loaded: Any, words: int, length: int) -> Piece:
    """What the default measures find in one shard."""
    from heedful.diagnosis.corpus import Corpus
    from heedful.diagnosis.shards import Reader
    from tests.test_diagnose_texts import characters

    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "a.txt").write_text(SENTENCE * words)
        (shard,) = Corpus(Path(home)).shards()
        return Reader(loaded.model, loaded.tokenizer or characters(), _measures(), length, 1, {})(shard)


def _measures() -> tuple[Any, ...]:
    """Those of the default ones that read a corpus."""
    from heedful.diagnosis.measures import DEFAULT, reads_text

    return tuple(filter(reads_text, DEFAULT))


def merges(count: int) -> dict[str, Any]:
    """As many shards as are asked for, merged as the process that leads does it; processor seconds."""
    from heedful import models
    from heedful.core.stats import Mean
    from heedful.diagnosis.layers import by_layer
    from heedful.diagnosis.shards import Sums
    from heedful.diagnosis.workers import opened, packed

    rows = []
    default = models.default()
    for loaded, words, length in ((models.load("tiny:llama"), 60, 512), (default, 60, 512), (default, 400, 2048)):
        piece = _piece(loaded, words, length)
        sent = packed(piece)
        sums = Sums()
        began = time.process_time()
        for _ in range(count):
            sums = sums.plus(opened(sent))
        whole = sums.whole
        seconds = time.process_time() - began
        one = by_layer(piece.statistics)
        for key, stat in whole.items():
            if type(stat) is Mean and not (stat.count == count * one[key].tensors()["count"]).all():
                raise SystemExit(f"{key} was not counted {count} times")
        told = {"model": loaded.name, "window": length, "profiles": count, "bytes": len(sent), "seconds": seconds}
        rows.append(told)
        print(told, flush=True)
    return {"rows": rows}


@dataclass(eq=False)
class _Saved(Workers):
    """Gives one shard's statistics again and again, and notes when it is asked for the next."""

    piece: Piece
    asked: list[float] = field(default_factory=list)

    def each(self, read: Read, shards: Sequence[Any]) -> Pieces:
        for _ in shards:
            yield self.piece
            self.asked.append(time.perf_counter())


def checkpoints(count: int) -> dict[str, Any]:
    """So many saves of what a job of the default model has found so far, each after one more shard."""
    from heedful import diagnose, models
    from heedful.diagnosis import run as running
    from heedful.diagnosis.corpus import Corpus

    every, running.SAVE_EVERY = running.SAVE_EVERY, 0.0
    loaded, told = models.default(), list[float]()
    given = _Saved(_piece(loaded, 400, 2048))

    def note(now: Progress) -> None:
        if now.stage == "corpus" and now.done:
            told.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as home:
        line = f'{{"text": "{SENTENCE}"}}\n'
        (Path(home) / "a.jsonl").write_text(line * count)
        corpus = Corpus(Path(home) / "a.jsonl", shard=len(line))
        diagnose(loaded, corpus, measures=_measures(), workers=given, out=Path(home) / "out", progress=note)
    running.SAVE_EVERY = every
    seconds = [after - before for before, after in zip(told, given.asked, strict=True)]
    middle = statistics.median(seconds[5:])  # from when all five parts are there
    return {
        "saves": len(seconds),
        "seconds of one, median": middle,
        "seconds of one, highest": max(seconds),
        f"share of the time, at one every {every:.0f} s": middle / every,
    }


def simulated(shards: int, merge: Mapping[str, Any]) -> dict[str, Any]:
    """Workers of unlike speed and one that adds up in the order of the corpus, at what one row of `merges` found."""
    each, size = merge["seconds"] / merge["profiles"], merge["bytes"]
    slower = max(each, size / LINK)  # both go on at once
    rows = [_simulated(n, shards, seconds, slower) for seconds in (60.0, 6.0) for n in (1, 10, 100, 1000)]
    return {"shards": shards, "seconds of a merge": each, "bytes of a profile": size, "link": LINK, "rows": rows}


def _simulated(workers: int, shards: int, seconds: float, merge: float, seed: int = 0) -> dict[str, Any]:
    """Each shard takes from half to one and a half times as long, and each worker half to one and a half of that."""
    draw = random.Random(seed)
    slow = [draw.uniform(0.5, 1.5) for _ in range(workers)]
    free = [(0.0, n) for n in range(workers)]
    heapq.heapify(free)
    done = []
    for _ in range(shards):
        now, n = heapq.heappop(free)
        done.append(now + seconds * slow[n] * draw.uniform(0.5, 1.5))
        heapq.heappush(free, (done[-1], n))
    added: list[float] = []
    for when in done:  # in the order of the corpus, whoever was done first
        added.append(max(when, added[-1] if added else 0.0) + merge)
    moments = sorted([(when, 1) for when in done] + [(when, -1) for when in added])
    waiting = most = 0
    for _, change in moments:
        waiting += change
        most = max(most, waiting)
    ideal = shards * seconds / sum(1 / x for x in slow)
    return {
        "workers": workers,
        "seconds of a shard": seconds,
        "hours": added[-1] / 3600,
        "of the ideal": ideal / added[-1],
        "busy": shards * merge / added[-1],
        "most profiles that wait": most,
    }


def two_workers(rounds: int) -> dict[str, Any]:
    """The default model over one corpus, by one worker of Ray and by two, of one thread each, in turns.

    So many rounds, or as many as end within some minutes.
    """
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    load, began = [os.getloadavg()[0]], time.monotonic()
    for done in range(rounds):
        if done and (time.monotonic() - began) * (done + 1) / done > MINUTES * 60:
            break
        for workers, mine in found.items():
            rate, seconds = _rate(workers)
            mine.append((rate, seconds))
            load.append(os.getloadavg()[0])
            print(f"{workers} workers: {rate:.3f} documents a second, {seconds:.0f} s, load {load[-1]:.1f}", flush=True)
    (one, alone), (two, shared) = (zip(*mine, strict=True) for mine in found.values())
    ratios = [b / a for a, b in zip(one, two, strict=True)]
    return {
        "rounds": len(ratios),
        "documents a second, one worker": list(one),
        "documents a second, two workers": list(two),
        "ratio in each round": ratios,
        "ratio, median": statistics.median(ratios),
        "seconds of a job, Ray's start included": [statistics.median(x) for x in (alone, shared)],
        "load before it": load[0],
        "load, lowest and highest": [min(load), max(load)],
    }


def _rate(workers: int, shards: int = 16, documents: int = 2) -> tuple[float, float]:
    """Documents a second from the second shard that is there to the last, and the seconds of the whole job."""
    from heedful import diagnose, models
    from heedful.diagnosis.corpus import Corpus

    times: list[float] = []

    def note(now: Progress) -> None:
        if now.stage == "corpus" and now.done:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as home:
        line = f'{{"text": "{SENTENCE * 20}"}}\n'
        (Path(home) / "a.jsonl").write_text(line * documents * shards)
        corpus = Corpus(Path(home) / "a.jsonl", shard=documents * len(line))
        began = time.perf_counter()
        diagnose(models.default(), corpus, measures=_measures(), workers=Ray(workers), progress=note)
        seconds = time.perf_counter() - began
    if len(times) != shards:
        raise SystemExit(f"{len(times)} shards instead of {shards}")
    return documents * (shards - 2) / (times[-1] - times[1]), seconds
