"""Fair timing on a noisy machine: contenders take turns, and what counts is the ratio to the baseline of the turn."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from heedful.core.files import replace_text
from heedful.facts import processor

RECORDS = Path(__file__).parents[1] / "records"
_NOISE = re.compile(r"\((R|TM)\)| Processor| CPU")


def race(contenders: Mapping[str, Callable[[], Any]], rounds: int, baseline: str | None = None) -> dict[str, Any]:
    """Wall seconds of each, in turns after a warm-up, and the quartiles of its ratio to the first (or `baseline`)."""
    against = baseline or next(iter(contenders))
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for run in contenders.values():
            run()
        for _ in range(rounds):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                taken[name].append(time.perf_counter() - began)
    return told(taken, against)


def told(taken: Mapping[str, list[float]], against: str) -> dict[str, Any]:
    """Median seconds, and the quartiles of the ratio to the baseline of the same turn."""
    out = {}
    for name, seconds in taken.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, taken[against], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        out[name] = {
            "seconds": round(statistics.median(seconds), 6),
            "ratio": round(middle, 3),
            "quartiles": [round(low, 3), round(high, 3)],
        }
    return out


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": processor(),
        "torch_path": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def apart() -> None:
    """From now on records go to a folder of their own, as a try's must, and not over those of whole runs."""
    global RECORDS  # noqa: PLW0603 - the one place that says where records lie
    RECORDS = Path(tempfile.mkdtemp(prefix="heedful-speed-"))


def label(told: Mapping[str, Any]) -> str:
    """What tells one kind of machine from another: its processor, and the instructions that torch uses on it."""
    m = told["machine"]
    return f"{_NOISE.sub('', m['cpu']).strip()}, {m['torch_path']}"


def load(name: str) -> list[dict[str, Any]]:
    """What was measured last on each kind of machine, the newest at the end."""
    path = RECORDS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["machines"] if path.exists() else []


def record(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write what one machine gave beside what others did, whole or not at all."""
    from heedful import native

    kernel = native.library()
    told = {"machine": {**machine(), "native": getattr(kernel, "path", str(kernel))}, **more, "rows": rows}
    whole = [*(x for x in load(name) if label(x) != label(told)), told]
    path = RECORDS / f"{name}.json"
    replace_text(path, json.dumps({"machines": whole}, indent=1) + "\n")
    print(f"wrote {path}, {len(rows)} rows", flush=True)
