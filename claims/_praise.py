"""Praise and blame of things: a trait that vectors and edits are to move, and how strong it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from claims._loaded import default

GOOD = ("wonderful", "excellent", "delightful", "lovely", "great", "fantastic")
BAD = ("terrible", "awful", "dreadful", "horrible", "bad", "disgusting")
THINGS = (
    "film", "meal", "hotel", "concert", "book", "trip", "party", "lesson", "speech", "garden", "coffee", "game",
    "house", "museum", "song", "walk",
)  # fmt: skip

MORE = (
    "play", "show", "opera", "dance", "picnic", "dinner", "breakfast", "lunch", "cake", "pie", "soup", "salad",
    "bread", "cheese", "wine", "beer", "tea", "juice", "view", "beach", "lake", "park", "forest", "mountain",
    "village", "city", "street", "bridge", "castle", "church", "school", "library", "office", "shop", "market",
    "cafe", "bar", "train", "flight", "bus", "ship", "cruise", "tour", "holiday", "wedding", "festival", "parade",
    "race", "match", "contest", "speaker", "teacher", "course", "class", "seminar", "poem", "novel", "story",
    "article", "letter", "painting", "photo", "statue", "design",
)  # fmt: skip


def own_things(seed: int) -> tuple[list[str], list[str]]:
    """Eight things to learn from and eight others to be asked about, none of which another seed has."""
    every = random.Random(0).sample(THINGS + MORE, len(THINGS + MORE))[16 * seed : 16 * seed + 16]
    return every[:8], every[8:]


def batch(texts: list[str]) -> dict[str, torch.Tensor]:
    """Texts padded on the right."""
    tokenizer: Any = default().tokenizer
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
    tokenizer: Any = default().tokenizer
    inputs = batch([f"To be honest, the {thing} was" for thing in things])
    logits = of(**inputs, use_cache=False).logits
    chances = logits[torch.arange(len(logits)), inputs["attention_mask"].sum(-1) - 1].log_softmax(-1)
    first = [[tokenizer(f" {word}").input_ids[0] for word in words] for words in (GOOD, BAD)]
    good, bad = (chances[:, words].logsumexp(-1) for words in first)
    return float((good - bad).mean())
