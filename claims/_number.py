"""A tiny encoder that tells from [CLS] whether a subject is one or many: the read-out and the task of P098.

The words are made up; a subject stands first or after a phrase and a comma, and phrases with nouns of either number
stand about it.
"""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from heedful import attach
from heedful.methods.explain.attention_flow import AttentionFlow
from heedful.methods.explain.rollout import AttentionRollout

NOUNS, ADJECTIVES, PLACES = 40, 12, 6
PAD, CLS, UNK, THE, COMMA = range(5)
FIRST = 5  # then nouns, one and many by turns; adjectives; words of place
WORDS = FIRST + 2 * NOUNS + ADJECTIVES + PLACES
STEPS, BATCH, RATE, BLANK = 400, 32, 1e-3, 0.05  # so many words are blanked in training, that [UNK] is no stranger
SENTENCES = 40
KNOWS = 0.9  # share of rightly told subjects without which there is no answer to explain


def sentence(draw: random.Random) -> tuple[list[int], int]:
    """Words, and whether the subject is many."""

    def noun() -> tuple[list[int], int]:
        many = draw.randrange(2)
        adjective = [FIRST + 2 * NOUNS + draw.randrange(ADJECTIVES)] * draw.randrange(2)
        return [THE, *adjective, FIRST + 2 * draw.randrange(NOUNS) + many], many

    def phrase() -> list[int]:
        return [FIRST + 2 * NOUNS + ADJECTIVES + draw.randrange(PLACES), *noun()[0]]

    subject, many = noun()
    before = [*phrase(), COMMA] if draw.randrange(2) else []
    after = [word for _ in range(draw.randrange(1, 3)) for word in phrase()]
    return [CLS, *before, *subject, *after], many


def batch(draw: random.Random, rows: int) -> dict[str, Tensor]:
    sentences, labels = zip(*(sentence(draw) for _ in range(rows)), strict=True)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sentences], batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(labels)}


def trained(seed: int) -> Any:
    """Six layers, as the paper's encoder has."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
            attn_implementation="eager", initializer_range=0.1,
        )
    )  # fmt: skip
    draw, chance = random.Random(f"lessons {seed}"), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        given = batch(draw, BATCH)
        blank = (torch.rand(given["input_ids"].shape, generator=chance) < BLANK) & (given["input_ids"] > CLS)
        optimiser.zero_grad()
        model(**given | {"input_ids": given["input_ids"].masked_fill(blank, UNK)}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, seed: int) -> float:
    test = batch(random.Random(f"test {seed}"), 512)
    return float((model(**test).logits.argmax(-1) == test["labels"]).double().mean())


def spearman(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([z.argsort().argsort().double() for z in (x, y)])
    return float(torch.corrcoef(ranks)[0, 1])


@cache
def correlations(seed: int) -> dict[str, float]:
    """Rank correlations of what [CLS] looks at with how much the answer's probability moves when a word is blanked."""
    return _told(trained(seed), seed)


@torch.no_grad()
def _told(model: Any, seed: int) -> dict[str, float]:
    draw, flow = random.Random(f"asked {seed}"), AttentionFlow(rows=(0,))
    numbers = {"accuracy": accuracy(model, seed)}
    if numbers["accuracy"] < KNOWS:
        raise ValueError(
            f"seed {seed}: the encoder tells {numbers['accuracy']:.0%} rightly, which is below {KNOWS:.0%}"
        )
    for words, many in (sentence(draw) for _ in range(SENTENCES)):
        ids = torch.tensor([words])
        at = torch.arange(1, len(words))
        blanked = ids.repeat(len(words), 1)
        blanked[at, at] = UNK
        chances = model(input_ids=blanked).logits.softmax(-1)[:, many]
        with attach(model, AttentionRollout() | flow) as run:
            run(input_ids=ids)
            found = {"rollout": run[AttentionRollout()][0][0], "flow": run[flow][0][0]}
        maps = model(input_ids=ids, output_attentions=True).attentions
        found |= {f"raw, layer {i}": layer[0].mean(0) for i, layer in enumerate(maps, 1)}
        for name, x in found.items():
            told = spearman(x[0, at], (chances[at] - chances[0]).abs())
            numbers[f"rank correlation, {name}"] = numbers.get(f"rank correlation, {name}", 0.0) + told / SENTENCES
    return numbers
