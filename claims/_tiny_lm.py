"""A tiny language model of bytes, trained in seconds under any stack: what the claims about mechanisms share.

The text is Python's own documentation, which every interpreter brings along: about 450,000 bytes of English and code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from heedful import Site, attach
from heedful.authoring import reads
from heedful.core.call import Call
from heedful.core.method import Method, Part, Stack
from heedful.core.paper import Paper
from heedful.core.stats import Mean
from heedful.laboratory import language

LENGTH = 128  # bytes of a training sequence
BATCH = 8
RATE = 3e-3


def text(held_out: bool) -> Tensor:
    """The bytes of every tenth topic, or of all others."""
    return language.text(0, held_out)


def batch(generator: torch.Generator, held_out: bool = False, rows: int = BATCH) -> Tensor:
    data = text(held_out)
    starts = torch.randint(0, len(data) - LENGTH, (rows,), generator=generator)
    return torch.stack([data[i : i + LENGTH] for i in starts.tolist()])


def fresh(seed: int, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    return language.byte_model(64, layers, 4, LENGTH)


def shown(seed: int, count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of training text, as a fit takes them."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": batch(generator)} for _ in range(count)]


@torch.no_grad()
def held_out_loss(model: Any, seed: int, rows: int) -> float:
    """Loss on held-out text of the seed's own."""
    ids = batch(torch.Generator().manual_seed(seed), held_out=True, rows=rows)
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


class Trained:
    """A model trained under a stack and still attached to it; call it like the model."""

    def __init__(self, what: Part | Stack | None, seed: int, steps: int, layers: int = 2) -> None:
        self.model = fresh(seed, layers)
        self.run = attach(self.model, Stack() if what is None else what)
        self.norms: list[float] = []  # of each step's gradient, before it is clipped
        self._train(seed, steps)

    def __call__(self, **inputs: Any) -> Any:
        return self.run(**inputs)

    def _train(self, seed: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.01)
        self.model.train()
        for step in range(steps):
            rate = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = rate
            ids = batch(generator)
            optimiser.zero_grad()
            self(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)))
            optimiser.step()
        self.model.eval()

    @torch.no_grad()
    def loss(self, batches: int = 8) -> float:
        """Held-out loss in nats a byte, on the same text for every model."""
        generator = torch.Generator().manual_seed(12345)
        found = []
        for _ in range(batches):
            ids = batch(generator, held_out=True, rows=32)
            found.append(self(input_ids=ids, labels=ids, use_cache=False).loss.item())
        return sum(found) / len(found)


class HeadNorm(Method):
    """The mean length of what a head hands to the output projection."""

    paper = Paper("claims", "A measure of heedful's own", "heedful", 2026, venue="heedful")

    @reads(Site.HEAD_OUTPUT)
    def read(self, heads: Tensor, call: Call) -> Mean:
        return Mean.of(heads.norm(dim=-1).sum(), heads.shape[:3].numel())
