"""Our cache methods beside kvpress' nearest presses, at equal budget, on the same prompts and weights.

python -m benchmarks.quality.kvpress [--prompts 20] [--quick]      (HF_HUB_OFFLINE=1; it installs kvpress beside itself)

The context is read and its cache cut before the question is known; then nothing more is dropped. Neither a press nor a
CACHE edit changes the reading, so each context is read once on each side. kvpress pins an older transformers, so it
runs in an environment of its own; KVPRESS_PYTHON names one that is there already.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.peers import TORCH
from benchmarks.speed.timing import record
from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.core.call import CachedKV, Call, Kept
from heedful.core.errors import InactiveWarning
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.core.state import State
from heedful.core.summary import Summary, sums
from heedful.laboratory.differences import Difference
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.methods.sparse.prefill.sink_window import SinkWindow
from heedful.tasks.needle import Needle, NeedleMany
from heedful.tasks.task import Item, Task

SHARES = (0.25, 0.5)
GRADES = ("right", "nats")  # share of answers that are right, and nats a token of the right one
TASKS: tuple[Task, ...] = (Needle(length=448), NeedleMany(length=448))
NEAREST = {
    "KNorm": "KnormPress",
    "SnapKV": "SnapKVPress",
    "HeavyHitter": "ObservedAttentionPress",
    "SinkWindow": "StreamingLLMPress",
}
Answer = dict[str, Any]  # right, nats, kept


def ours(kept: int) -> dict[str, Method]:
    """Each method, with so many entries a head."""
    return {
        "KNorm": KNorm(kept),
        "SnapKV": SnapKV(kept),
        "HeavyHitter": HeavyHitter(kept),
        # the window counts the next query, which the cache does not hold; its mask stays out: a press has none either
        "SinkWindow": SinkWindow(4, kept - 4 + 1),
    }


class Judges(Method):
    """Drops nothing, and asks several methods what they would keep of what was read."""

    paper = Paper("none", "a probe of this benchmark", "none", 2026)
    methods: tuple[Method, ...] = ()
    found: dict[tuple[int, int], Tensor] = field(default_factory=dict, hash=False, compare=False)  # by method, layer

    @sums("received")
    def weigh(self, pattern: Summary, call: Call) -> None:
        call.state.forward["received"] = pattern.received

    @at(Site.CACHE)
    def judge(self, entries: CachedKV, call: Call) -> Tensor:
        for i, method in enumerate(self.methods):
            edit = next(e for e in method.edits if e.site is Site.CACHE)
            seen = replace(call, state=State(forward=dict(call.state.forward)))
            self.found[i, call.layer] = getattr(method, edit.name)(entries, seen)
        return entries.is_filled


def split(item: Item) -> dict[str, list[int]]:
    """What is read before the question is known, the question, and the right answer."""
    tokens = list(item.prompt.tokens)
    return {"context": tokens[: item.cut], "question": tokens[item.cut :], "answer": list(item.options[0])}


def read(model: Any, item: dict[str, list[int]], method: Method) -> Any:
    with attach(model, method) as run:
        return run(input_ids=torch.tensor([item["context"]]), use_cache=True, logits_to_keep=1)[CACHE]


@torch.no_grad()
def answers(model: Any, item: dict[str, list[int]], methods: tuple[Method, ...]) -> list[Answer]:
    """With the whole cache, and with what each of the methods keeps of it."""
    judges = Judges(methods)
    whole, out = read(model, item, judges), []
    rest, right = torch.tensor([item["question"] + item["answer"][:-1]]), torch.tensor(item["answer"])
    for i in range(-1, len(methods)):
        cache = copy.deepcopy(whole)
        for number, layer in enumerate(cache.layers):
            if i >= 0:
                layer.keep(Kept(judges.found[i, number]))
        kept = max(max(layer.counts) for layer in cache.layers)
        with attach(model, Stack()) as run:  # knows the shortened cache and drops nothing
            logits = run(input_ids=rest, **{CACHE: cache}).logits[0, -len(right) :]
        likely = logits.log_softmax(-1)[torch.arange(len(right)), right]
        out.append({"right": bool((logits.argmax(-1) == right).all()), "nats": float(likely.mean()), "kept": kept})
    return out


@torch.no_grad()
def require_same(model: Any, item: dict[str, list[int]], methods: tuple[Method, ...]) -> None:
    """Asked as judges, methods keep what they keep when they are attached."""
    judges = Judges(methods)
    read(model, item, judges)
    for i, method in enumerate(methods):
        if not any(edit.site is Site.MASK for edit in method.edits):
            for number, layer in enumerate(read(model, item, method).layers):
                wanted = judges.found[i, number].nonzero()[:, 2]
                if not torch.equal(layer.index.flatten(), wanted):
                    raise ValueError(f"{method!r} keeps other entries when it is attached, layer {number}")


def theirs(model: Any, items: list[dict[str, list[int]]], presses: list[str]) -> dict[str, Any]:
    """What kvpress answers, and the versions that it answered with."""
    with tempfile.TemporaryDirectory(prefix="heedful-") as home:
        folder, prompts, told = (Path(home) / name for name in ("model", "prompts.json", "answers.json"))
        model.save_pretrained(folder)
        prompts.write_text(json.dumps({"items": items, "shares": SHARES, "presses": presses}), encoding="utf-8")
        python = os.environ.get("KVPRESS_PYTHON") or install(Path(home) / "kvpress")
        script = str(Path(__file__).with_name("press.py"))
        # -P: kvpress is the package, not the file of this name beside the script
        quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        subprocess.run([python, "-P", script, str(folder), str(prompts), str(told)], check=True, env=quiet)
        return dict(json.loads(told.read_text(encoding="utf-8")))


def install(home: Path) -> str:
    python = str(home / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    for package in (TORCH, "kvpress"):
        subprocess.run([*pip, package], check=True)
    return python


def gap(mine: list[Answer], other: list[Answer], what: str) -> dict[str, float]:
    """The mean paired difference, ours less theirs, and its interval over prompts."""
    found = Difference.of([float(a[what]) - float(b[what]) for a, b in zip(mine, other, strict=True)])
    return {"mean": round(found.mean, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def measure(prompts: int, write: bool = True) -> list[dict[str, Any]]:
    model, tokenizer, _ = models.default()
    sets = {task: [split(item) for item in task.items(tokenizer, prompts)] for task in TASKS}
    items = [item for found in sets.values() for item in found]
    told = theirs(model, items, list(NEAREST.values()))
    warnings.simplefilter("ignore", InactiveWarning)  # the judges drop nothing
    require_same(model, items[0], tuple(ours(64).values()))
    names = [(name, share) for share in SHARES for name in NEAREST]
    mine: list[list[Answer]] = []
    for item in items:
        made = [ours(int(len(item["context"]) * share))[name] for name, share in names]
        mine.append(answers(model, item, tuple(made)))
    rows: list[dict[str, Any]] = []
    for n, (name, share) in enumerate([("whole", 1.0), *names]):
        press = NEAREST.get(name, "whole")
        found, other = [row[n] for row in mine], told["found"][press if share == 1 else f"{press} {share}"]
        if [a["kept"] for a in found] != [a["kept"] for a in other]:
            raise ValueError(f"{name} and {press} at {share}: unequal budgets, the comparison would mean nothing")
        for i, task in enumerate(sets):
            part = slice(i * prompts, (i + 1) * prompts)
            row = {"task": repr(task), "method": name, "press": press, "share": share, "prompts": prompts}
            for side, all_of in (("ours", found), ("kvpress", other)):
                row[side] = {what: round(statistics.fmean(a[what] for a in all_of[part]), 4) for what in GRADES}
            row["gaps"] = {what: gap(found[part], other[part], what) for what in GRADES}
            rows.append(row)
            print(row, flush=True)
    if write:
        about = (
            "context read and cut first, then the question; answers graded greedily, and nats a token of the right one"
        )
        record("kvpress", rows, model="SmolLM2-135M", asked=about, versions=told["versions"])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.kvpress")
    parser.add_argument("--prompts", type=int, default=20, help="of each of the two tasks")
    parser.add_argument("--quick", action="store_true", help="two prompts a task, and no record")
    given = parser.parse_args()
    measure(2 if given.quick else given.prompts, not given.quick)
