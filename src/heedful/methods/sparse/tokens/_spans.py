"""Spans of a prompt that stay or go whole: which of them there is room for, and what they share with a question."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from heedful.core.kinds.tokens import Prompt
from heedful.core.regions import Span

STEEP, BY_LENGTH = 1.2, 0.75  # BM25's usual constants


def without(prompt: Prompt, spans: Iterable[Span]) -> Prompt:
    """The prompt less these spans."""
    gone = {i for a, b in spans for i in range(a, b)}
    return prompt.only(tuple(i for i in range(len(prompt)) if i not in gone)) if gone else prompt


def with_room(spans: tuple[Span, ...], scores: Tensor, room: int) -> list[Span]:
    """The spans of the best scores, one at least, up to the first that `room` tokens do not hold any more."""
    kept: list[Span] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        room -= spans[i][1] - spans[i][0]
        if kept and room < 0:
            break
        kept.append(spans[i])
    return kept


def bm25(prompt: Prompt, spans: tuple[Span, ...], question: Span) -> Tensor:
    """How much each span shares with the question by Okapi's BM25, whose words are tokens here, `[spans]`."""
    texts = [Counter(prompt.tokens[a:b]) for a, b in spans]
    mean = sum(text.total() for text in texts) / len(texts)
    scores = []
    for text in texts:
        found = 0.0
        for token in prompt.tokens[slice(*question)]:
            having, times = sum(token in other for other in texts), text[token]
            rare = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
            found += rare * times * (STEEP + 1) / (times + STEEP * (1 - BY_LENGTH + BY_LENGTH * text.total() / mean))
        scores.append(found)
    return torch.tensor(scores)


def scaled(scores: Tensor) -> Tensor:
    """From 0 for the lowest to 1 for the highest; 0 where all are alike."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if bool(high > low) else torch.zeros_like(scores)
