"""The attention call alone: torch's kernel, ours without and with statistics, plain tiles; then one decode step.

The same under what models do to their scores: windows, biases, soft caps, sink logits.

Random inputs: the time of a dense call does not depend on what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.speed.timing import race, record
from heedful.core.call import Call
from heedful.core.mask import Causal, Mask, Rule, Window
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
TORCH, FLEX = "SDPA, or eager where it cannot", "FlexAttention"
WINDOW, CAP = 512, 50.0  # tokens; what Gemma 2 bounds its scores by
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


def ours(
    method: Method, backend: str, q: Tensor, k: Tensor, v: Tensor,
    rules: tuple[Rule, ...] = (), softcap: float | None = None, **more: Tensor,
) -> Callable[[], Tensor]:  # fmt: skip
    """A call under a method; `more` are the model's bias and sink logits."""
    queries = Positions.row(k.shape[2] - q.shape[2], q.shape[2], q.device)
    keys = Positions.row(0, k.shape[2], q.device)
    mask = Mask((Causal(), *rules))
    call = Call(0, 1, "bare", q.shape[1], k.shape[1], queries, keys, q.shape[3] ** -0.5, softcap, mask=mask)
    run_state = RunState(Stack((method,)))
    run_state.new_forward()
    job = AttentionCall(run_state.plan(call), run_state, call, **more)
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


def eager(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None = None, sink: Tensor | None = None
) -> Tensor:
    """As transformers writes attention out, where torch's kernel has no word for it."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sink is not None:
        scores = torch.cat([scores, sink.to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]] @ v


@cache
def compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, keep: Callable[..., Tensor], score: Any = None) -> Callable[[], Tensor]:
    """FlexAttention, which is compiled for each mask and score where it is first called."""
    blocks = create_block_mask(lambda b, h, i, j: keep(i, j), None, None, len(q[0, 0]), len(k[0, 0]), q.device)
    return lambda: compiled()(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)


def under(q: Tensor, k: Tensor, v: Tensor) -> dict[str, tuple[dict[str, Any], dict[str, Callable[[], Tensor]]]]:
    """What models do to their scores: what we are told of it, and torch's own attention with the same."""
    n, h = q.shape[2], q.shape[1]
    back = torch.arange(n)[:, None] - torch.arange(n)
    slopes = 2.0 ** (-8 / h * torch.arange(1, h + 1))  # ALiBi's
    each = slopes.view(1, h, 1, 1)
    causal, near, alibi = (
        torch.where(keep, table, float("-inf")).to(q.dtype)
        for keep, table in ((back >= 0, 0.0), ((back >= 0) & (back < WINDOW), 0.0), (back >= 0, -each * back))
    )
    sink, cap = torch.zeros(1, h, 1, 1), torch.tensor(CAP)  # no plain number: it would be compiled as one that changes

    def before(i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    return {
        f"a window of {WINDOW}": ({"rules": (Window(WINDOW),)}, {
            TORCH: lambda: sdpa(q, k, v, attn_mask=near, enable_gqa=True),
            FLEX: flex(q, k, v, lambda i, j: (i >= j) & (i - j < WINDOW)),
        }),
        "ALiBi's bias": ({"bias": each * torch.arange(n)}, {
            TORCH: lambda: sdpa(q, k, v, attn_mask=alibi, enable_gqa=True),
            FLEX: flex(q, k, v, before, lambda score, b, h, i, j: score + slopes[h] * j),
        }),
        "a soft cap": ({"softcap": CAP}, {
            TORCH: lambda: eager(q, k, v, causal, softcap=CAP),
            FLEX: flex(q, k, v, before, lambda score, b, h, i, j: cap * torch.tanh(score / cap)),
        }),
        "sink logits": ({"sink": sink}, {TORCH: lambda: eager(q, k, v, causal, sink=sink)}),
    }  # fmt: skip


def beside(lengths: tuple[int, ...], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    for dtype, kind in TYPES.items():
        for shape, (h, g, d) in SHAPES.items():
            torch.compiler.reset()  # or it would soon compile no more
            for n in lengths:
                if n * h * d > 2**22:
                    continue  # minutes a round, in eager torch
                q, k, v = draw(h, g, d, n, n, kind)
                for what, (told, torch_s) in under(q, k, v).items():
                    contenders = {
                        **torch_s,
                        "native": ours(Idle(), "native", q, k, v, **told),
                        "native, row and key statistics": ours(Columns(), "native", q, k, v, **told),
                        "tiled, row and key statistics": ours(Columns(), "tiled", q, k, v, **told),
                    }
                    found = race(contenders, rounds)
                    rows.append({"shape": f"{what}, {shape}", "type": dtype, "tokens": n, "found": found})
                    print(what, shape, dtype, n, {name: x["ratio"] for name, x in found.items()}, flush=True)
    record("under", rows, baseline=TORCH, inputs="random, causal, one text")


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
