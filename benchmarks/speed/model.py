"""The whole default model: a plain forward against runs that do nothing, diagnose, or keep every map."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.timing import race, record
from heedful import attach, models
from heedful.core.method import Stack
from heedful.diagnosis.measures import chosen, reads_text
from heedful.diagnosis.texts import Delimiters

PROCESSES = 3  # whose peaks are measured: how an allocator divides its memory differs from one to the next
TEXT = Path(__file__).parents[2] / "src" / "heedful" / "cli" / "text.txt"


def load() -> tuple[Any, Any]:
    model, tokenizer, _ = models.default()
    return model, tokenizer


def tokens(tokenizer: Any, n: int) -> Tensor:
    """The embedded text, as often as it takes."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    return ids.repeat(1, -(-n // ids.shape[1]))[:, :n]


def contenders(model: Any, tokenizer: Any, n: int) -> dict[str, Callable[[], Any]]:
    """By name; each is one forward over the same tokens, attaching and answering included."""
    ids = tokens(tokenizer, n)
    feed = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    measures = Stack(tuple(part for part in chosen(None) if reads_text(part)))
    roles = {"delimiters": Delimiters(tokenizer).spans(ids[0])}

    def run(what: Stack, backend: str = "auto") -> None:
        with attach(model, what, backend=backend, roles=roles) as attached:
            attached(**feed)
        attached.answers()

    def eager() -> None:
        model.set_attn_implementation("eager")
        try:
            model(**feed, output_attentions=True)
        finally:
            model.set_attn_implementation("sdpa")

    eager_too = {"output_attentions": eager} if n <= 2048 else {}  # 19 GB at 4k
    return {
        "plain forward": lambda: model(input_ids=ids, use_cache=False),
        "plain forward, last logits": lambda: model(**feed),
        "attached, nothing to do": lambda: run(Stack()),
        "diagnose, native": lambda: run(measures),
        "diagnose, tiled": lambda: run(measures, "tiled"),
        **eager_too,
    }


def alone_in_a_process(contender: str) -> float:
    """MB that one contender takes at most, in a process of its own, where it is this expression."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # OMP_PROC_BIND ties this thread, and what it starts
    code = f"from benchmarks.speed import model, training; model.alone({contender})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return float(told.split()[-1])


def alone(contender: Callable[[], Any]) -> None:
    with torch.no_grad():
        contender()
    # of this process since it began; getrusage would count what it was forked from
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def measure(quick: bool = False) -> None:
    model, tokenizer = load()
    lengths = (512, 1024) if quick else (1024, 2048, 8192)
    rows: list[dict[str, Any]] = []
    for n in lengths:
        found = race(contenders(model, tokenizer, n), 3 if quick else max(3, 7 * 2048 // (n + 1024)))
        rows.append({"tokens": n, "found": found})
        print(n, {name: x["ratio"] for name, x in found.items()}, flush=True)
    record("model", rows, baseline="plain forward", model="SmolLM2-135M")


def memory(quick: bool = False) -> None:
    """The peaks of the same contenders, each in several processes of its own, whatever else the machine does."""
    model, tokenizer = load()
    rows: list[dict[str, Any]] = []
    for n in (512,) if quick else (1024, 2048, 8192):
        peaks: dict[str, list[float]] = {name: [] for name in contenders(model, tokenizer, n)}
        for name in [*peaks] * (1 if quick else PROCESSES):
            peaks[name].append(round(alone_in_a_process(f"model.contenders(*model.load(), {n})[{name!r}]"), 1))
        middle = {name: statistics.median(mb) for name, mb in peaks.items()}
        rows.append({"tokens": n, "peak_mb": middle, "peak_range": {x: [min(mb), max(mb)] for x, mb in peaks.items()}})
        print(n, peaks, flush=True)
    record("memory", rows, model="SmolLM2-135M")
