"""Time and memory on a device, a budget of seconds, and one record for each part, written row by row."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import timing
from benchmarks.speed.timing import told

Row = dict[str, Any]
SOURCES = Path(__file__).parents[2] / "src" / "heedful"


@dataclass(frozen=True)
class Sizes:
    """How large everything is: on a card, or in a rehearsal of the same code where there is none."""

    lengths: tuple[int, ...]  # tokens that the model reads
    prefill: tuple[int, ...]
    cache: int
    batches: tuple[int, ...]
    shape: tuple[int, int, int]  # heads, key heads, width
    layers: int
    inner: int  # width of the feed-forward part
    vocabulary: int
    rounds: int
    repeats: int  # of a decode step, which is too short for a clock
    block: int
    methods: int  # that laws are tried on, at most
    laws: tuple[str, ...]  # all where none are named
    tests: tuple[str, ...]  # files
    of_tests: tuple[str, ...]  # which ones of them
    tuned: tuple[int, ...]  # widths of heads
    sizes: tuple[tuple[int, int, int, int], ...]  # rows, keys, warps, stages to try
    dtype: torch.dtype = torch.bfloat16


CARD = Sizes(
    lengths=(2048, 8192, 32768, 131072), prefill=(32768, 131072), cache=32768, batches=(1, 16), shape=(32, 8, 64),
    layers=16, inner=8192, vocabulary=128256, rounds=7, repeats=50, block=128, methods=1000, laws=(),
    tests=("tests/test_triton_launch.py", "tests/test_triton_step.py", "tests/test_triton_backward.py",
           "tests/test_triton.py"),
    of_tests=("-m", ""), tuned=(64, 128),
    sizes=((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2),
           (128, 64, 8, 3), (128, 128, 8, 2)),
)  # fmt: skip
REHEARSAL = Sizes(
    lengths=(16, 24), prefill=(128,), cache=40, batches=(1, 2), shape=(2, 1, 16), layers=1, inner=32, vocabulary=96,
    rounds=1, repeats=1, block=64, methods=2, laws=("any_shape", "backends_agree"),
    tests=("tests/test_triton.py",), of_tests=("-k", "sink_logits"), tuned=(16,), sizes=((16, 16, 4, 2),),
)  # fmt: skip


def sources() -> str:
    """A digest of what is measured: rows of other sources are measured again."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("gpu/*.py"), *SOURCES.glob("engine/backends/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def card(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card: a rehearsal"
    found = {"card": name, "torch": torch.__version__, "cuda": str(torch.version.cuda or torch.version.hip)}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


@dataclass
class Kept:
    """The rows of one part. Rows that were measured on this card, of these sources, are not measured again."""

    part: str
    device: torch.device
    again: bool = False
    rows: list[Row] = field(default_factory=list)
    whole: bool = False

    def __post_init__(self) -> None:
        self.facts = {**card(self.device), "sources": sources()}
        old = read(self.part)
        if old is not None and old["facts"] == self.facts and not self.again:
            self.rows = old["rows"]

    def has(self, **named: Any) -> bool:
        return any(all(row.get(name) == x for name, x in named.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()
        print(self.part, row, flush=True)

    def write(self) -> None:
        path = timing.RECORDS / f"gpu_{self.part}.json"
        beside = path.with_suffix(".part")
        told = {"facts": self.facts, "whole": self.whole, "rows": self.rows}
        beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def read(part: str) -> dict[str, Any] | None:
    path = timing.RECORDS / f"gpu_{part}.json"
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


@dataclass(frozen=True)
class Room:
    """What a part is given: a device, sizes, and until when it may begin something new."""

    device: torch.device
    sizes: Sizes
    until: float

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    @property
    def left(self) -> float:
        return max(1.0, self.until - time.monotonic())

    def settle(self) -> None:
        """Wait for what the device was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def race(self, contenders: Mapping[str, Callable[[], Any]], repeats: int = 1) -> Row:
        """Seconds and peak memory of each, in turns after a warm-up, and ratios to the first; two turns at least."""
        taken: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, float] = {}
        against = next(iter(contenders))
        with torch.no_grad():
            for name, run in contenders.items():
                peaks[name] = self._peak(run)
            while len(taken[against]) < (2 if self.over else self.sizes.rounds):
                for name, run in contenders.items():
                    self.settle()
                    began = time.perf_counter()
                    for _ in range(repeats):
                        run()
                    self.settle()
                    taken[name].append((time.perf_counter() - began) / repeats)
        return {"found": told(taken, against), **({"peak_mb": peaks} if self.device.type == "cuda" else {})}

    def _peak(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            run()
            return 0.0
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.settle()
        return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
