"""inflection: do adapters in the layers that it names teach a well-trained model more than adapters in others?"""

from __future__ import annotations

import argparse
import dataclasses
import doctest
import inspect
import math
import random
import tarfile
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from claims._tiny_lm import LENGTH, RATE, batch, fresh
from claims.ledger import Claim, run
from heedful.explaining import inflection

LAYERS, CHOSEN, RANK = 6, 2, 4
SOURCE = {"over": 240, "under": 48}  # steps of training before the adapters
TUNING, TEXTS = 50, 8  # steps with adapters; sequences that a step and the diagnosis see
MODULES = (argparse, dataclasses, doctest, inspect, tarfile)  # one a seed
OTHERS = 2  # draws of other layers


class _Adapted(nn.Module):
    """W x + B A x, of which A and B learn."""

    def __init__(self, inner: nn.Linear, draw: torch.Generator) -> None:
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(RANK, inner.in_features, generator=draw) / math.sqrt(inner.in_features))
        self.b = nn.Parameter(torch.zeros(inner.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out + x @ self.a.mT @ self.b.mT


def _code(seed: int) -> Tensor:
    """The bytes of a module of Python's own library."""
    return torch.frombuffer(bytearray(inspect.getsource(MODULES[seed]).encode()), dtype=torch.uint8).long()


def _some(data: Tensor, draw: torch.Generator, rows: int = TEXTS) -> Tensor:
    starts = torch.randint(0, len(data) - LENGTH, (rows,), generator=draw)
    return torch.stack([data[i : i + LENGTH] for i in starts.tolist()])


def _train(model: Any, steps: int, rate: float, texts: Any) -> None:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=rate, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        ids = texts()
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
    model.eval()


def _tuned(model: Any, layers: list[int], learned: Tensor, asked: Tensor, seed: int) -> float:
    """The loss on code that was held back, of a copy whose adapters in these layers have learned from other code."""
    copy, draw = deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    for layer in layers:
        part = copy.model.layers[layer].self_attn
        part.q_proj, part.v_proj = _Adapted(part.q_proj, draw), _Adapted(part.v_proj, draw)
    _train(copy, TUNING, RATE, lambda: _some(learned, draw))
    with torch.no_grad():
        return float(copy(input_ids=asked, labels=asked, use_cache=False).loss)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    code = _code(seed)
    learned, kept = code[: len(code) * 3 // 4], code[len(code) * 3 // 4 :]
    numbers: dict[str, float] = {}
    for name, steps in SOURCE.items():
        draw = torch.Generator().manual_seed(seed)
        model: Any = fresh(seed, LAYERS)
        _train(model, steps, RATE, lambda draw=draw: batch(draw))
        asked = _some(kept, draw, 64)
        found = inflection(model, [{"input_ids": _some(learned, draw)} for _ in range(2)])
        best = found.top(CHOSEN)
        rest, pick = [n for n in range(LAYERS) if n not in best], random.Random(seed)
        others = [sorted(pick.sample(rest, CHOSEN)) for _ in range(OTHERS)]
        with torch.no_grad():
            numbers[f"loss as it is, {name}"] = float(model(input_ids=asked, labels=asked).loss)
        numbers[f"loss, inflection layers, {name}"] = _tuned(model, best, learned, asked, seed)
        drawn = [_tuned(model, layers, learned, asked, seed) for layers in others]
        numbers[f"loss, others, {name}"] = sum(drawn) / len(drawn)
        numbers |= {f"score of layer {n}, {name}": x for n, x in enumerate(found.score.tolist())}
        numbers[f"gain, {name}"] = numbers[f"loss, others, {name}"] - numbers[f"loss, inflection layers, {name}"]
    return numbers["gain, over"], numbers


CLAIM = Claim(
    key="P297",
    method="inflection",
    says="Adapters at inflection layers, where maps are sharp and gradients fall, help a model that was trained long "
    "on its source; one that was trained briefly they do not help.",
    paper_number="none in the abstract; BERT-base, from SST-2 to Rotten Tomatoes",
    setup=f"{LAYERS}-layer byte models trained on Python's documentation for {SOURCE['over']} steps, or "
    f"{SOURCE['under']}, then tuned for {TUNING} steps on the source of one module of Python's library, another for "
    f"each seed, with adapters of rank {RANK} at queries and values of {CHOSEN} layers alone: those of the highest "
    f"score on that code, against {OTHERS} pairs drawn from the others. Loss on the last quarter of the module. The "
    "author adapts a classifier; what comes of the briefly trained model is in the details.",
    effect="nats a byte by which adapters at inflection layers end lower than at others, of the long-trained model",
    measure=measure,
    seeds=len(MODULES),
)

if __name__ == "__main__":
    run(CLAIM)
