"""Linear attention against SDPA by the number of tokens, and from how many on it is the faster one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.speed.attention import draw, ours
from benchmarks.speed.timing import race, record
from heedful.core.method import Method
from heedful.methods import MALA, EfficientAttention, FlowAttention, InLine, LightningAttention, LLNAttention

METHODS: tuple[Method, ...] = (
    MALA(), EfficientAttention(), FlowAttention(), LLNAttention(), LightningAttention(), InLine(),
)  # fmt: skip
SHAPE = (9, 3, 64)  # heads, key heads, width


def measure(lengths: tuple[int, ...], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    for n in lengths:
        q, k, v = draw(*SHAPE, n, n, torch.float32)
        found = race(
            {
                "sdpa": lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
                **{type(method).__name__: ours(method, "auto", q, k, v) for method in METHODS},
            },
            rounds,
        )
        rows.append({"shape": "9/3 heads of 64", "type": "float32", "tokens": n, "found": found})
        print(n, {name: x["ratio"] for name, x in found.items()}, flush=True)
    record("linear", rows, baseline="sdpa", inputs="random, causal, one text", faster_from=faster_from(rows))


def faster_from(rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """The fewest tokens from which on each is faster than the baseline at every length that was tried."""
    out: dict[str, int | None] = {}
    for name in rows[-1]["found"]:
        slower = [row["tokens"] for row in rows if row["found"][name]["ratio"] >= 1]
        out[name] = min((row["tokens"] for row in rows if row["tokens"] > max(slower, default=0)), default=None)
    return {name: n for name, n in out.items() if name != "sdpa"}
