"""A tiny language model of bytes, trained in seconds under any stack: what the claims about mechanisms share.

The text is Python's own documentation, which every interpreter brings along: about 450,000 bytes of English and code.
"""

from __future__ import annotations

import math
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from heedful import Site, attach
from heedful.authoring import reads
from heedful.core.call import Call
from heedful.core.method import Method, Part, Stack
from heedful.core.paper import Paper
from heedful.core.stats import Mean

LENGTH = 128  # bytes of a training sequence
BATCH = 8
RATE = 3e-3


@cache
def text(held_out: bool) -> Tensor:
    """The bytes of every tenth topic, or of all others."""
    chosen = [body for i, (_, body) in enumerate(sorted(topics.items())) if (i % 10 == 0) == held_out]
    return torch.frombuffer(bytearray("\n".join(chosen).encode()), dtype=torch.uint8).long()


def batch(generator: torch.Generator, held_out: bool = False, rows: int = BATCH) -> Tensor:
    data = text(held_out)
    starts = torch.randint(0, len(data) - LENGTH, (rows,), generator=generator)
    return torch.stack([data[i : i + LENGTH] for i in starts.tolist()])


def fresh(seed: int, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


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


class OutputShape(Method):
    """Kurtosis and largest magnitude of each text's attention-block output, means over texts."""

    paper = HeadNorm.paper

    @reads(Site.OUTPUT)
    def read(self, output: Tensor, call: Call) -> Mean:
        x = output.flatten(1).double()
        centred = x - x.mean(1, keepdim=True)
        kurtosis = centred.pow(4).mean(1) / centred.square().mean(1).square()
        return Mean.of(torch.stack([kurtosis.sum(), x.abs().amax(1).sum()]), len(x))


def read(model: nn.Module, what: Part | Stack, reader: Method) -> Tensor:
    """What a reader finds on held-out text under a stack: the mean over layers."""
    with attach(model, what) as run, torch.no_grad():
        run(input_ids=batch(torch.Generator().manual_seed(12345), held_out=True, rows=32), use_cache=False)
        return torch.stack([mean.value for mean in run[reader].values()]).mean(0)


def _rounded(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    step = ((high - low) / 255).clamp(min=1e-12)
    return ((x - low) / step).round().clamp(0, 255) * step + low


class EightBits:
    """While open, every linear map has 8-bit weights and 8-bit inputs: one scale a tensor, from its extremes."""

    def __init__(self, model: nn.Module) -> None:
        self.maps = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def __enter__(self) -> None:
        self.weights = [m.weight.data for m in self.maps]
        self.handles = []
        for m in self.maps:
            top = m.weight.data.abs().max()
            m.weight.data = _rounded(m.weight.data, -top, top)
            self.handles.append(
                m.register_forward_pre_hook(
                    lambda _, args: (_rounded(args[0], args[0].min(), args[0].max()), *args[1:])
                )
            )

    def __exit__(self, *error: object) -> None:
        for m, weight in zip(self.maps, self.weights, strict=True):
            m.weight.data = weight
        for handle in self.handles:
            handle.remove()


def outliers(what: Method | None, seed: int, steps: int) -> dict[str, float]:
    """Train under a method (softmax when None); what comes of outliers and of 8 bits."""
    reader = OutputShape()  # in the stack from the start, because learned gates live and die with their run
    trained = Trained(reader if what is None else what | reader, seed, steps)
    loss = trained.loss()
    with EightBits(trained.model):
        eight = trained.loss()
    trained.run.reset()
    trained.loss(1)
    kurtosis, high = torch.stack([mean.value for mean in trained.run[reader].values()]).mean(0).tolist()
    return {"loss": loss, "8-bit loss minus loss": eight - loss, "kurtosis": kurtosis, "largest": high}
