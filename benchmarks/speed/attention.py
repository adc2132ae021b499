"""The attention call alone: torch's kernel, ours without and with statistics, plain tiles; then one decode step.

Random inputs: the time of a dense call does not depend on what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.speed.timing import race, record
from heedful.core.call import Call
from heedful.core.mask import Causal, Mask
from heedful.core.method import Method, Stack
from heedful.core.paper import Paper
from heedful.core.positions import Positions
from heedful.core.sites import Site, at
from heedful.core.stats import Statistic
from heedful.core.summary import PARTS, Summary, sums
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.run_state import RunState
from heedful.engine.select import select
from heedful.kit.chosen import Chosen

PAPER = Paper("none", "a probe of this benchmark", "none", 2026)
SHAPES = {"9/3 heads of 64": (9, 3, 64), "32/8 heads of 128": (32, 8, 128)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Idle(Method):
    """Touches the queries without changing them, so that our kernel has to run."""

    paper = PAPER

    @at(Site.QUERY)
    def keep(self, q: Tensor, call: Call) -> Tensor:
        return q


class Picked(Method):
    """Every key of a sixteenth that chance picks, the same for all heads, as methods do that rank tokens."""

    paper = PAPER

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & Chosen(lambda rows: _sixteenth(len(call.keys)))


@cache
def _sixteenth(keys: int) -> Tensor:
    return torch.rand(1, 1, 1, keys, generator=torch.Generator().manual_seed(0)) < 1 / 16


class Columns(Method):
    """What each key gets, entropy, highest weight, weight on the first token."""

    paper = PAPER

    @sums("received", "entropy", "peak", "first")
    def look(self, pattern: Summary, call: Call) -> Statistic | None:
        return None


class Everything(Method):
    """All parts, the distance profile too."""

    paper = PAPER

    @sums(*PARTS)
    def look(self, pattern: Summary, call: Call) -> Statistic | None:
        return None


def draw(heads: int, kv_heads: int, d: int, q: int, k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """As models lay them out: tokens before heads."""
    return tuple(
        torch.randn(1, n, x, d).to(dtype).transpose(1, 2) for n, x in ((q, heads), (k, kv_heads), (k, kv_heads))
    )


def ours(method: Method, backend: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    queries = Positions.row(k.shape[2] - q.shape[2], q.shape[2], q.device)
    keys = Positions.row(0, k.shape[2], q.device)
    call = Call(0, 1, "bare", q.shape[1], k.shape[1], queries, keys, q.shape[3] ** -0.5, mask=Mask((Causal(),)))
    run_state = RunState(Stack((method,)))
    run_state.new_forward()
    job = AttentionCall(run_state.plan(call), run_state, call)
    return lambda: attend(job, q, k, v, lambda needs: select(backend, needs))[0]


def prefill(lengths: tuple[int, ...], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    for dtype, kind in TYPES.items():
        for shape, (h, g, d) in SHAPES.items():
            for n in lengths:
                q, k, v = draw(h, g, d, n, n, kind)
                if n * h * d > 2**24:
                    continue  # minutes a round
                found = race(
                    {
                        "sdpa": lambda q=q, k=k, v=v: sdpa(q, k, v, is_causal=True, enable_gqa=True),
                        "native": ours(Idle(), "native", q, k, v),
                        "native, row and key statistics": ours(Columns(), "native", q, k, v),
                        "native, all statistics": ours(Everything(), "native", q, k, v),
                        **({"tiled, row and key statistics": ours(Columns(), "tiled", q, k, v)} if n <= 8192 else {}),
                    },
                    max(3, rounds * 2048 // max(n, 2048)),
                )
                rows.append({"shape": shape, "type": dtype, "tokens": n, "found": found})
                print(shape, dtype, n, {name: x["ratio"] for name, x in found.items()}, flush=True)
    record("attention", rows, baseline="sdpa", inputs="random, causal, one text")


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A group's query heads as rows of one product, which torch can do too."""
    b, h, _, d = q.shape
    g = k.shape[1]
    rows = q.reshape(b * g, h // g, d) * d**-0.5
    weights = torch.bmm(rows, k.reshape(b * g, -1, d).mT).softmax(-1)
    return torch.bmm(weights, v.reshape(b * g, -1, d)).view(b, h, 1, d)


def step(lengths: tuple[int, ...], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    for dtype, kind in TYPES.items():
        for shape, (h, g, d) in SHAPES.items():
            for n in lengths:
                q, k, v = (x.contiguous() for x in draw(h, g, d, 1, n, kind))
                found = race(
                    {
                        "sdpa, grouped": lambda q=q, k=k, v=v: sdpa(q, k, v, enable_gqa=True),
                        "packed": lambda q=q, k=k, v=v: packed(q, k, v),
                        "native": ours(Idle(), "native", q, k, v),
                        "native, all statistics": ours(Everything(), "native", q, k, v),
                        "native, a sixteenth picked": ours(Picked(), "native", q, k, v),
                        "tiled, a sixteenth picked": ours(Picked(), "tiled", q, k, v),
                    },
                    rounds,
                )
                rows.append({"shape": shape, "type": dtype, "tokens": n, "found": found})
                print(shape, dtype, n, {name: x["ratio"] for name, x in found.items()}, flush=True)
    record("decode_step", rows, baseline="sdpa, grouped", inputs="random, one query after a cache")
