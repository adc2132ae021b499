"""The attention call and the way back through it: time, and memory with the map kept or computed again in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.speed.attention import Idle, draw, ours
from benchmarks.speed.model import alone_in_a_process
from benchmarks.speed.timing import race, record
from heedful.methods import SigmoidAttention

SHAPE = (9, 3, 64)  # heads, key heads, width


def contenders(n: int) -> dict[str, Callable[[], None]]:
    """By name; each computes heads of the same random inputs, and all their gradients."""
    q, k, v = (x.requires_grad_() for x in draw(*SHAPE, n, n, torch.float32))
    found = {
        "sdpa": lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True),
        "softmax, map kept": ours(Idle(), "reference", q, k, v),
        "softmax, tiled": ours(Idle(), "tiled", q, k, v),
        "softmax, native": ours(Idle(), "native", q, k, v),
        "sigmoid, map kept": ours(SigmoidAttention(), "reference", q, k, v),
        "sigmoid, tiled": ours(SigmoidAttention(), "tiled", q, k, v),
        "sigmoid, native": ours(SigmoidAttention(), "native", q, k, v),
    }

    def there_and_back(heads: Callable[[], Tensor]) -> None:
        with torch.enable_grad():
            torch.autograd.grad(heads().sum(), (q, k, v))

    return {name: (lambda heads=heads: there_and_back(heads)) for name, heads in found.items()}


def nothing() -> None:
    """What a process takes without the call."""


def peak(name: str, n: int) -> float:
    """MB that one contender takes at most, beyond its inputs and the libraries."""
    return alone_in_a_process(f"training.contenders({n})[{name!r}]") - alone_in_a_process(
        f"(training.contenders({n}), training.nothing)[1]"
    )


def measure(lengths: tuple[int, ...], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    for n in lengths:
        runs = contenders(n)
        if n > 4096:
            runs = {name: run for name, run in runs.items() if "kept" not in name}  # 10 GB at 8k
        found = race(runs, rounds)
        peaks = {name: round(peak(name, n), 1) for name in runs}
        rows.append({"shape": "9/3 heads of 64", "type": "float32", "tokens": n, "found": found, "peak_mb": peaks})
        print(n, {name: x["ratio"] for name, x in found.items()}, peaks, flush=True)
    record("training", rows, baseline="sdpa", inputs="random, causal, one text, gradients of queries, keys and values")
