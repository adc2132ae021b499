"""Build every class in its own process, two at a time, and write down what became of it."""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing as mp
import os
import re
import resource
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.utils import logging

from . import tiny
from .names import class_names

MEMORY = 10 << 30
ZERO = "coverage_zero"


def _zero(*given: Any, **named: Any) -> tuple[torch.Tensor, None]:
    query = named["query"] if "query" in named else given[1]
    value = named["value"] if "value" in named else given[3]
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def sensitivity(one: tiny.Tiny, reference: list[torch.Tensor]) -> float | None:
    """How far the output moves when every attention of the interface gives zeros; None if it has none."""
    AttentionInterface.register(ZERO, _zero)
    AttentionMaskInterface.register(ZERO, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    try:
        one.model.set_attn_implementation(ZERO)
        if one.model.config._attn_implementation != ZERO:
            return None
        moved = tiny.output_tensors(one.forward())
        pairs = [(a, b) for a, b in zip(moved, reference, strict=True) if a.shape == b.shape]
        return max((float((a - b).abs().nan_to_num(0).max()) for a, b in pairs), default=None)
    except Exception:  # noqa: BLE001 - a model that refuses zeros has no known effect
        return None


def examine(name: str) -> dict[str, Any]:
    """Build one class, run it twice in eager mode, and report."""
    start = time.perf_counter()
    try:
        one = tiny.build(name)
    except tiny.CannotBuild as failure:
        return {"status": "cannot", "reason": str(failure)}
    one.model.set_attn_implementation("eager")
    first, second = (tiny.output_tensors(one.forward()) for _ in range(2))
    stable = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
    return {
        "status": "built",
        "level": one.level,
        "inputs": {k: list(v.shape) for k, v in one.inputs.items()},
        "parameters": sum(p.numel() for p in one.model.parameters()),
        "outputs": len(first),
        "largest": max(float(t.abs().nan_to_num(0).max()) for t in first),
        "nan": any(not bool(torch.isfinite(t).all()) for t in first),
        "repeatable": stable,
        "effect": sensitivity(one, first),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _child(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    try:
        pipe.send(examine(name))
    except BaseException as error:  # noqa: BLE001 - whatever ends a child is its reason
        pipe.send({"status": "cannot", "reason": f"{type(error).__name__}: {str(error)[:300]}"})
    pipe.close()


@dataclass
class AttentionCall:
    """One class under way."""

    group: str
    name: str
    process: BaseProcess
    pipe: Connection
    deadline: float


def run(todo: list[tuple[str, str]], workers: int, limit: float) -> Any:
    """Yield a record for each class, in the order they finish."""
    context = mp.get_context("fork")
    queue = collections.deque(todo)
    jobs: list[AttentionCall] = []
    while queue or jobs:
        while queue and len(jobs) < workers:
            group, name = queue.popleft()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, theirs))
            process.start()
            theirs.close()
            jobs.append(AttentionCall(group, name, process, mine, time.monotonic() + limit))
        wait([job.pipe for job in jobs], timeout=1)
        for job in list(jobs):
            if not job.pipe.poll() and time.monotonic() < job.deadline:
                continue
            record = {"status": "cannot", "reason": f"over {limit:.0f} s"}
            if job.pipe.poll():
                try:
                    record = job.pipe.recv()
                except EOFError:
                    record = {"status": "cannot", "reason": "the process died"}
            job.process.kill()
            job.process.join()
            jobs.remove(job)
            yield {"class": job.name, "group": job.group, **record}


def main() -> None:
    """Command line: which classes, where to write, and how to share the work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression over class names")
    parser.add_argument("--group", default="", help="regular expression over groups")
    parser.add_argument("--shard", default="1/1", help="i/n: the i-th of n equal shares")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=60, help="seconds for one class")
    parser.add_argument("--out", type=Path, help="JSON lines; classes already in it are not run again")
    parser.add_argument("--retry", action="store_true", help="run classes again that are in --out as not built")
    options = parser.parse_args()
    share, shares = map(int, options.shard.split("/"))
    chosen = [c for c in class_names() if re.search(options.only, c[1]) and re.search(options.group, c[0])]
    chosen = chosen[share - 1 :: shares]
    text = options.out.read_text() if options.out and options.out.exists() else ""
    old = [json.loads(line) for line in text.splitlines()]
    kept = {r["class"]: r for r in old if not (options.retry and r["status"] != "built")}
    if options.out and options.retry:
        options.out.write_text("".join(json.dumps(r) + "\n" for r in kept.values()))
    records = [kept[name] for _, name in chosen if name in kept]
    start = time.monotonic()
    for record in run([c for c in chosen if c[1] not in kept], options.workers, options.limit):
        records.append(record)
        how = "built" if record["status"] == "built" else f"cannot build: {record['reason'][:170]}"
        print(f"{record['group']:14} {record['class']:45} {how}", flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    counts = collections.Counter((r["group"], r["status"]) for r in records)
    for group in dict.fromkeys(r["group"] for r in records):
        built = counts[group, "built"]
        print(f"{group:16} {built:4} of {built + counts[group, 'cannot']:4} build")
    print(f"all {sum(r['status'] == 'built' for r in records)} of {len(records)} in {time.monotonic() - start:.0f} s")
