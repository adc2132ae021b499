"""Praise and blame of things: a trait that vectors and edits are to move, and how strong it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from heedful import models

GOOD = ("wonderful", "excellent", "delightful", "lovely", "great", "fantastic")
BAD = ("terrible", "awful", "dreadful", "horrible", "bad", "disgusting")
THINGS = (
    "film", "meal", "hotel", "concert", "book", "trip", "party", "lesson", "speech", "garden", "coffee", "game",
    "house", "museum", "song", "walk",
)  # fmt: skip


@cache
def model() -> models.Loaded:
    return models.default()


def batch(texts: list[str]) -> dict[str, torch.Tensor]:
    """Texts padded on the right."""
    tokenizer: Any = model().tokenizer
    ids = [torch.tensor(tokenizer(text).input_ids) for text in texts]
    text = torch.arange(max(map(len, ids))) < torch.tensor([[len(x)] for x in ids])
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), "attention_mask": text.long()}


def praise_and_blame(things: list[str], ending: str = "") -> list[dict[str, Any]]:
    """One batch for praise and one for blame; their texts differ in the words of it."""
    return [
        {
            **batch(
                [
                    f"I must say that the {thing} was {word}" + ending.format(word)
                    for thing in things
                    for word in words[:3]
                ]
            ),
            "positive": words is GOOD,
        }
        for words in (GOOD, BAD)
    ]


def trait(of: Callable[..., Any], things: list[str]) -> float:
    """Log odds of a good word over a bad one as the next, mean over things, which a fit should not have seen."""
    tokenizer: Any = model().tokenizer
    inputs = batch([f"To be honest, the {thing} was" for thing in things])
    logits = of(**inputs, use_cache=False).logits
    chances = logits[torch.arange(len(logits)), inputs["attention_mask"].sum(-1) - 1].log_softmax(-1)
    first = [[tokenizer(f" {word}").input_ids[0] for word in words] for words in (GOOD, BAD)]
    good, bad = (chances[:, words].logsumexp(-1) for words in first)
    return float((good - bad).mean())
