"""What a run adds to each token that a model writes: time of the whole model, and operations of torch's in a layer.

Operations do not depend on the machine. On a GPU each is launched, however little it does, and each look at a number
waits for all that was launched before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.sparse import text
from benchmarks.speed.timing import record, told
from heedful import attach, models
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.core.method import Method, Stack
from heedful.methods.observe.sink_rate import SinkRate
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter
from heedful.methods.sparse.cache.kivi import KIVI
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.methods.sparse.cache.snap_kv import SnapKV
from heedful.methods.sparse.cache.think import ThinK
from heedful.methods.sparse.cache.tova import TOVA
from heedful.methods.sparse.prefill.sink_window import SinkWindow

STEPS = 16
BASE = "plain"
RUNS: dict[str, Stack | Method] = {
    "attached, nothing to do": Stack(),
    "SinkRate": SinkRate(),
    "SinkWindow, 4 and 256": SinkWindow(4, 256),
    "KNorm, a quarter": KNorm(0.25),
    "TOVA, a quarter": TOVA(0.25),
    "HeavyHitter, a quarter": HeavyHitter(0.25),
    "SnapKV, a quarter": SnapKV(0.25),
    "KIVI": KIVI(),
    "ThinK": ThinK(),
}


class Operations(TorchDispatchMode):
    """Counts what torch is asked to compute, views left out, and how often somebody looks at a number of it."""

    def __init__(self) -> None:
        super().__init__()
        self.done = self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += not func.is_view
        picks = args[1] if func in PICK else ()
        self.looks += func in LOOKS or any(x is not None and x.dtype == torch.bool for x in picks)
        return func(*args, **(kwargs or {}))


aten = torch.ops.aten
LOOKS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
}  # fmt: skip
PICK = {aten.index.Tensor, aten.index_put_.default}  # by a mask: how many that are is counted first


def read(model: Any, ids: Tensor) -> Any:
    """The cache of a text that was read."""
    return cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))


def step(model: Any, cache: Any, token: Tensor) -> None:
    model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE: cache})


def counted(model: Any, ids: Tensor) -> tuple[float, float]:
    """Operations and looks of one step, after a few, for each layer of the model."""
    cache, layers = read(model, ids), model.config.num_hidden_layers
    for _ in range(3):
        step(model, cache, ids[:, :1])
    with Operations() as operations:
        step(model, cache, ids[:, :1])
    return operations.done / layers, operations.looks / layers


@torch.no_grad()
def added(model: Any, ids: Tensor, what: Stack | Method) -> tuple[float, float]:
    """What a run adds to them."""
    plain = counted(model, ids)
    with attach(model, what):
        under = counted(model, ids)
    return under[0] - plain[0], under[1] - plain[1]


def seconds(model: Any, ids: Tensor) -> float:
    """Of a step, after the text was read."""
    cache = read(model, ids)
    began = time.perf_counter()
    for i in range(STEPS):
        step(model, cache, ids[:, i : i + 1])
    return (time.perf_counter() - began) / STEPS


def under(model: Any, what: Stack | Method, do: Callable[[], float]) -> float:
    with attach(model, what):
        return do()


@torch.no_grad()
def measure(tokens: int = 1024, rounds: int = 5) -> None:
    model, tokenizer, _ = models.default()
    ids = text(tokenizer, tokens)
    taken: dict[str, list[float]] = {name: [] for name in (BASE, *RUNS)}
    for turn in range(rounds + 1):
        found = {BASE: seconds(model, ids)}
        found |= {name: under(model, what, lambda: seconds(model, ids)) for name, what in RUNS.items()}
        for name, each in found.items() if turn else ():
            taken[name].append(each)
    operations = {name: added(model, ids, what) for name, what in RUNS.items()}
    rows: list[dict[str, Any]] = [{"tokens": tokens, "found": told(taken, BASE), "added": operations}]
    print({name: (x["ratio"], operations.get(name)) for name, x in rows[0]["found"].items()}, flush=True)
    record("decoding", rows, baseline=BASE, model="SmolLM2-135M")
