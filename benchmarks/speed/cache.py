"""The attention of one decode step after a cache that was cut to a quarter, against the whole cache; and its bytes.

The baseline is the packed product of `attention.py`, not SDPA: packing alone beats SDPA's grouped call. Beside the step
alone stands one that appends a token, attends, and drops one again; choosing which to drop is not part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.speed.attention import SHAPES, TYPES, Idle, draw, ours, packed
from benchmarks.speed.timing import race, record
from heedful.adapters.kvcache import HeldLayer, cache_bytes
from heedful.core.call import Call, Kept
from heedful.core.mask import Causal, Mask
from heedful.core.method import Stack
from heedful.core.positions import Positions
from heedful.engine.attend import attend
from heedful.engine.attention_call import AttentionCall
from heedful.engine.run_state import RunState
from heedful.engine.select import select
from heedful.methods.sparse.cache.knorm import KNorm

SHARE = 4  # one entry in so many stays
SPREAD = (0.25, 0.5, 0.75, 2.5)  # uneven heads hold so many times their share, in turn


def counts(heads: int, n: int, even: bool) -> list[int]:
    """Entries of each head, a quarter of all together."""
    if even:
        return [n // SHARE] * heads
    sizes = [SPREAD[i % len(SPREAD)] for i in range(heads)]
    return [round(n * heads / SHARE * size / sum(sizes)) for size in sizes]


def cut(k: Tensor, v: Tensor, even: bool) -> HeldLayer:
    """A layer that read all of it and kept a quarter, strewn over the text."""
    held = HeldLayer()
    held.update(k, v)
    chosen = torch.rand(k.shape[:3], device=k.device).argsort(-1).argsort(-1)
    held.keep(Kept(chosen < torch.tensor(counts(k.shape[1], k.shape[2], even), device=k.device)[None, :, None]))
    return held


def measured(*layers: DynamicLayer) -> int:
    cache = DynamicCache()
    cache.layers.extend(layers)
    return cache_bytes(cache)


def attention(held: HeldLayer, q: Tensor, backend: str = "native") -> Callable[[Tensor, Tensor], Tensor]:
    """Our attention over what a layer holds, from its places to the heads, for a text without padding.

    What the adapter does around it (reading the model's arguments, asking what to drop) is not part of it.
    """
    run_state = RunState(Stack((KNorm(),)))
    run_state.new_forward()
    queries, mask = Positions.row(held.seen, 1, q.device), Mask((Causal(),))  # which the layers of a step share

    def run(k: Tensor, v: Tensor) -> Tensor:
        keys = held.positions(None)
        call = Call(0, 1, "bare", q.shape[1], k.shape[1], queries, keys, q.shape[3] ** -0.5, mask=mask)
        job = AttentionCall(run_state.plan(call), run_state, call)
        return attend(job, q, k, v, lambda needs: select(backend, needs))[0]

    return run


def alone(q: Tensor, held: HeldLayer, backend: str = "native") -> Callable[[], Tensor]:
    """Attention with nothing around it."""
    attended = attention(held, q, backend)
    return lambda: attended(*held.handed)


def whole_step(q: Tensor, layer: DynamicLayer, new: Tensor) -> Callable[[], Tensor]:
    """Append, attend, and go back to where it was."""

    def run() -> Tensor:
        before = layer.keys, layer.values
        out = packed(q, *layer.update(new, new))
        layer.keys, layer.values = before
        return out

    return run


def cut_step(q: Tensor, held: HeldLayer, new: Tensor) -> Callable[[], Tensor]:
    """Append, attend, and drop the newest again: what is dropped matters little to how long that takes."""
    attended = attention(held, q)

    def run() -> Tensor:
        held.served = True
        out = attended(*held.update(new, new))
        held.keep(Kept(held.is_filled & (held.index < held.seen - 1)))
        held.seen -= 1
        return out

    return run


def measure(lengths: tuple[int, ...], rounds: int) -> None:
    rows: list[dict[str, Any]] = []
    for dtype, kind in TYPES.items():
        for shape, (h, g, d) in SHAPES.items():
            for n in lengths:
                q, k, v = (x.contiguous() for x in draw(h, g, d, 1, n, kind))
                new = torch.randn(1, g, 1, d).to(kind)
                whole = DynamicLayer()
                whole.update(k, v)
                even, uneven = cut(k, v, True), cut(k, v, False)
                kept = (even.keys, even.values)
                on_even, on_uneven = alone(q, even), alone(q, uneven)
                found = race(
                    {
                        "packed, whole cache": lambda q=q, k=k, v=v: packed(q, k, v),
                        "SDPA, whole cache": lambda q=q, k=k, v=v: sdpa(q, k, v, enable_gqa=True),
                        "native, whole cache": ours(Idle(), "native", q, k, v),
                        "packed, a quarter": lambda q=q, kept=kept: packed(q, *kept),
                        "native, a quarter": on_even,
                        "native, an uneven quarter": on_uneven,
                        "append to the whole cache, packed": whole_step(q, whole, new),
                        "append, native, drop, a quarter": cut_step(q, even, new),
                        "append, native, drop, an uneven quarter": cut_step(q, uneven, new),
                    },
                    rounds,
                )
                held = {"whole": measured(whole), "quarter": measured(even), "uneven quarter": measured(uneven)}
                rows.append({"shape": shape, "type": dtype, "tokens": n, "found": found, "bytes": held})
                print(shape, dtype, n, {name: x["ratio"] for name, x in found.items()}, held, flush=True)
    record(
        "cache", rows, baseline="packed, whole cache", inputs="random, one query after a cache; entries kept at random"
    )
