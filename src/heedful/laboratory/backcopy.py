"""Words that mostly follow from the one before, and now and then are the one before that, so that a head must rest.

The commonest words are triggers: behind one stands the word before it again. Everywhere else the next word is drawn
from a table's row of the last one, for which no attention is needed. What softmax does there, whose weights must add up
to one, is to give them to the first token, and it takes no long training to do so. After T. Guo, D. Pai, Y. Bai,
J. Jiao, M. Jordan and S. Mei, Active-Dormant Attention Heads (arXiv 2410.13835).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor, nn

from heedful.adapters.wrapped import device_of
from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.engine.run import Run
from heedful.kit.told import at_places, token_ids
from heedful.laboratory.course import Batch, Course, Opener, Quantity, Recipe, told
from heedful.laboratory.language import KURTOSIS, MAXIMA, OUTLIERS, SINKS, eight_bits, outliers

FIRST = 0  # the token that opens every text; words are numbered from 1 on, triggers before the others
UNEVEN = 0.1  # Dirichlet's parameter: how few of all words are likely behind one
TRIED = 256  # texts in the end


@cache
def table(words: int, seed: int) -> Tensor:
    """How likely each word is behind each, `[before next]`, the likeliest words first: another table for each seed."""
    likely = np.random.default_rng(seed).dirichlet([UNEVEN] * words, words)
    order = np.argsort(-likely.sum(0))
    return torch.from_numpy(likely[order][:, order])


class _Resting(Method):
    """The share of its weight that a head gives the first token where nothing is to be copied, the mean of heads."""

    triggers: int

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        words = at_places(token_ids(call), call.queries)
        size = weights.abs()  # rows need not add up to one, nor be positive
        share = (size * (call.k_pos == 0)[..., None, :]).sum(-1) / size.sum(-1).clamp(min=1e-9)
        rests = (words > self.triggers).expand_as(share)
        return Mean.of((share * rests).sum(), rests.sum())


@dataclass(frozen=True)
class BackCopy(Course):
    """Predict the next word. Trained fast, and without cutting gradients, softmax parks on the first token."""

    name: ClassVar[str] = "backcopy"
    about: ClassVar[str] = (
        "Predicts words that follow from the one before or, behind triggers, are the one before that."
    )
    timed: ClassVar[bool] = False  # the text's costs are its own
    recipe: ClassVar[Recipe] = Recipe(rate=2e-2, warm_up=100, decay=0.0, memory=0.99, longest=math.inf)
    tokens: int = 614_400
    length: int = 32  # of a text
    rows: int = 4
    words: int = 64
    triggers: int = 3  # the commonest words
    width: int = 64
    inner: int = 16  # width of the feed-forward part: a wide one undoes what a head adds where it should rest
    layers: int = 1
    heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.triggers < self.words:
            raise FieldError(self, "triggers", self.triggers, f"must be 1 or more, and below {self.words} words", 3)

    @property
    def a_batch(self) -> int:
        return self.rows * self.length

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        return (
            Quantity("loss", "Held-out loss a word.", "nats", False),
            Quantity("copied", "Words behind a trigger that are named.", "share right", True),
            Quantity("8-bit", "What 8-bit weights and activations add to the held-out loss.", "nats", False),
            Quantity("resting", "What heads give the first token where nothing is to be copied.", "share"),
            *OUTLIERS,
        )

    def model(self, seed: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1 + self.words, hidden_size=self.width, intermediate_size=self.inner,
                num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
                max_position_embeddings=self.length, tie_word_embeddings=False, attn_implementation="sdpa",
            )
        )  # fmt: skip

    def copies(self, ids: Tensor) -> Tensor:
        """Which words `[b n]` stand behind a trigger that stands behind a word, and so are known."""
        known = torch.zeros_like(ids, dtype=torch.bool)
        known[:, 2:] = (ids[:, 1:-1] <= self.triggers) & (ids[:, :-2] != FIRST)
        return known

    def drawn(self, seed: int, random: Generator, rows: int) -> Tensor:
        """Texts `[b n]`: the opening token, a word drawn evenly, and what follows from it."""
        up_to = table(self.words, seed).cumsum(1)
        up_to[:, -1] = 1.0
        chance = torch.rand(self.length, rows, generator=random, dtype=torch.float64)
        ids = torch.full((rows, self.length), FIRST)
        ids[:, 1] = 1 + (chance[1] * self.words).long()
        for n in range(2, self.length):
            last, before = ids[:, n - 1], ids[:, n - 2]
            new = 1 + torch.searchsorted(up_to[last - 1], chance[n, :, None], right=True)[:, 0]
            ids[:, n] = before.where((last <= self.triggers) & (before != FIRST), new)
        return ids

    def batch(self, seed: int, random: Generator) -> Batch:
        ids = self.drawn(seed, random, self.rows)
        return {"input_ids": ids, "labels": ids}

    def measure(self, opened: Opener, seed: int) -> dict[str, float]:
        ids = self.drawn(seed, Generator().manual_seed(10_000 + seed), TRIED)
        resting, known = _Resting(self.triggers), self.copies(ids)[:, 1:]

        def read(run: Run) -> tuple[float, Tensor]:
            """The loss, and which words were named."""
            device = device_of(run.model)
            logits = run(input_ids=ids.to(device), use_cache=False).logits[:, :-1].float().cpu()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            return float(loss), logits.argmax(-1) == ids[:, 1:]

        with opened(SINKS, MAXIMA, KURTOSIS, resting) as run:
            loss, named = read(run)
            found = {"loss": loss, "copied": float(named[known].float().mean())} | outliers(run)
            if (by_layer := told(run, resting)) is not None:
                found["resting"] = fmean(float(mean.value) for mean in by_layer.values())
        with opened() as run, eight_bits(run.model):
            found["8-bit"] = read(run)[0] - loss
        return found
