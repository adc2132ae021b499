"""A tiny model that is told pairs of a key and a value, one a token, and is then asked for values: long-range recall.

A key may stand anywhere among the pairs, so that what a question may see decides what it can be answered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from heedful import attach
from heedful.core.method import Part, Stack

PAIRS = 64
ASKED = 8
VALUES = 16
BATCH = 32
WIDTH = 64
RATE = 3e-3


class Told(nn.Module):
    """The embeddings of keys and values, added up in one token; the last value stands for a question."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(PAIRS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        return self.keys(keys) + self.values(values)


def drawn(random: torch.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[b pairs + asked]`, and the answers `[b asked]`."""
    keys = torch.rand(rows, PAIRS, generator=random).argsort(1)
    values = torch.randint(VALUES, (rows, PAIRS), generator=random)
    asked = torch.rand(rows, PAIRS, generator=random).argsort(1)[:, :ASKED]
    ask = torch.full((rows, ASKED), VALUES)
    return torch.cat([keys, keys.gather(1, asked)], 1), torch.cat([values, ask], 1), values.gather(1, asked)


def recall(what: Part | Stack, seed: int, steps: int, heads: int = 2) -> float:
    """Train under a stack; the share of questions about fresh pairs that are answered rightly."""
    torch.manual_seed(seed)
    told = Told()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VALUES, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
            num_attention_heads=heads, head_dim=32, max_position_embeddings=PAIRS + ASKED, attn_implementation="sdpa",
        )
    )  # fmt: skip
    run, random = attach(model, what), torch.Generator().manual_seed(seed)
    weights = [*told.parameters(), *model.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    for _ in range(steps):
        keys, values, answers = drawn(random, BATCH)
        logits = run(inputs_embeds=told(keys, values), use_cache=False).logits[:, -ASKED:]
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        keys, values, answers = drawn(torch.Generator().manual_seed(10_000 + seed), 512)
        found = run(inputs_embeds=told(keys, values), use_cache=False).logits[:, -ASKED:].argmax(-1)
    run.close()
    return float((found == answers).float().mean())
