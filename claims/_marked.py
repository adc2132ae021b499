"""Prompts in which two passages disagree and one of them is marked: what the claims about marked spans share."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from claims._loaded import default
from heedful import attach
from heedful.core.method import Method, Scoped, Stack

NAMES = "apple,river,stone,cloud,tiger,piano,candle,garden,bridge,winter,orange,silver,doctor,forest,window,basket"
WORDS = "red,blue,green,black,white,pink,brown,gold,gray,purple,yellow,blind,cold,warm,soft,loud"
LINES = 8
ASKS = (
    "Question: what is the code of the {}?\nAnswer: the code is",
    "Tell me the code of the {}. It is",
    "So the code of the {} is",
)


@dataclass(frozen=True, eq=False)
class Marked:
    """A prompt, its marked passage, and the first tokens of what that passage and the other one say."""

    tokens: torch.Tensor  # [1 n]
    spans: tuple[tuple[int, int], ...]
    right: int
    wrong: int
    asks: int  # where the question begins

    @property
    def batch(self) -> dict[str, Any]:
        """As a fit takes it."""
        options = torch.tensor([[self.right, self.wrong]])
        return {"input_ids": self.tokens, "options": options, "roles": {"marked": self.spans}}


def prompts(seed: int, count: int, passage: int = 1) -> list[Marked]:
    """Eight lines, two of which give the same thing different codes; the passage of either may be the marked one.

    A passage has so many lines, a divisor of eight, and only one of the two lines in question.
    """
    draw, tokenizer = random.Random(seed), default().tokenizer
    out = []
    for i in range(count):
        names, words = draw.sample(NAMES.split(","), LINES - 1), draw.sample(WORDS.split(","), LINES)
        asked, other = draw.sample(range(LINES), 2)
        if asked // passage == other // passage:
            other = (other + passage) % LINES
        names.insert(max(asked, other), names[min(asked, other)])
        ids: list[int] = []
        ends = [0]
        for name, word in zip(names, words, strict=True):
            ids += tokenizer(f"The code of the {name} is {word}.\n").input_ids
            ends.append(len(ids))
        first = asked // passage * passage
        span = (ends[first], ends[first + passage])
        asks = len(ids)
        ids += tokenizer(ASKS[i % len(ASKS)].format(names[asked])).input_ids
        right, wrong = (tokenizer(f" {words[line]}").input_ids[0] for line in (asked, other))
        out.append(Marked(torch.tensor([ids]), (span,), right, wrong, asks))
    return out


@torch.no_grad()
def score(asked: list[Marked], what: Method | Scoped | Stack | None, elsewhere: bool = False) -> tuple[float, float]:
    """Mean log-probability of the marked passage's word, and how often it beats the other's.

    `elsewhere` marks another passage's place instead: the same number of tokens, before or after.
    """
    model = default().model
    chance, wins = 0.0, 0.0
    with attach(model, what or Stack()) as run:
        for item in asked:
            spans = item.spans
            if elsewhere:
                (start, stop), *_ = spans
                by = stop - start if start == 0 else -(stop - start)
                spans = ((max(0, start + by), stop + by),)
            run.roles = {"marked": spans}
            logits = run(input_ids=item.tokens, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            chance += float(logits[item.right]) / len(asked)
            wins += float(logits[item.right] > logits[item.wrong]) / len(asked)
    return chance, wins


def gain(
    asked: list[Marked], way: Method | Scoped, beside: Mapping[str, Method | Scoped]
) -> tuple[float, dict[str, float]]:
    """What it gains to mark the passage, over marking nothing and over marking another place, whichever is better."""
    numbers: dict[str, float] = {}
    for name, each in {"without": None, "marked": way, **beside}.items():
        numbers[f"log-probability, {name}"], numbers[f"beats the other, {name}"] = score(asked, each)
    numbers["log-probability, another place marked"], _ = score(asked, way, elsewhere=True)
    best = max(numbers["log-probability, without"], numbers["log-probability, another place marked"])
    return numbers["log-probability, marked"] - best, numbers
