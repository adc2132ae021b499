"""AttentionInfluence: do masked copying heads tell texts that refer to their own past from texts that do not?"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from claims._cache import TOWNS
from claims._loaded import default
from claims._texts import sentences
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.methods.intervene.language.attention_influence import AttentionInfluence

COPY, COPIES, TEXTS, FACTS = 24, 8, 4, 3  # tokens and prompts that heads are found on; texts of a kind; facts a text


@cache
def found(seed: int) -> AttentionInfluence:
    """The twentieth of heads that copy random tokens best."""
    draw = torch.Generator().manual_seed(seed)
    again = torch.randint(1000, 9000, (COPIES, COPY), generator=draw).repeat(1, 2)
    copies = {"input_ids": again, "roles": {"needle": ((0, COPY),), "answer": ((COPY, 2 * COPY),)}}
    method: AttentionInfluence = fit(AttentionInfluence(), default().model, [copies])
    return method


def by_chance(seed: int) -> AttentionInfluence:
    """As many heads of those that were not found."""
    chosen, model = found(seed).heads or (), default().model
    every = [(n, h) for n in range(model.config.num_hidden_layers) for h in range(model.config.num_attention_heads)]
    rest = [head for head in every if head not in chosen]
    return AttentionInfluence(heads=tuple(sorted(random.Random(seed).sample(rest, len(chosen)))))


def texts(seed: int) -> tuple[list[str], list[str]]:
    """Prose that gives some numbers and comes back to them, and the same that comes to others: no past tells these."""
    draw, referring, unrelated = random.Random(seed), [], []
    prose = iter(sentences(seed, 2 * TEXTS * FACTS))
    for _ in range(TEXTS):
        towns = draw.sample(TOWNS, FACTS)
        first, second = ([f"{draw.randrange(10**4):04d}" for _ in towns] for _ in range(2))
        start = " ".join(f"The number of {t} is {x}. {next(prose)}" for t, x in zip(towns, first, strict=True))
        between = [next(prose) for _ in towns]
        for kind, numbers in ((referring, first), (unrelated, second)):
            told = zip(between, towns, numbers, strict=True)
            kind.append(f"{start} " + " ".join(f"{text} The number of {t} is {x}." for text, t, x in told))
    return referring, unrelated


@torch.no_grad()
def influence(method: AttentionInfluence, batch: list[str]) -> Tensor:
    model, tokenizer, _ = default()
    scores = []
    for text in batch:
        inputs: dict[str, Any] = {"input_ids": tokenizer(text, return_tensors="pt").input_ids}
        plain = model(**inputs).logits
        with attach(model, method) as attached:
            scores.append(method.influence(plain, attached(**inputs).logits, inputs))
    return torch.cat(scores)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    kinds = dict(zip(("referring", "unrelated"), texts(seed), strict=True))
    numbers = {
        f"influence, {kind} texts, {how}": float(influence(method, batch).mean())
        for how, method in (("found heads", found(seed)), ("heads by chance", by_chance(seed)))
        for kind, batch in kinds.items()
    }
    found_gap, chance_gap = (
        numbers[f"influence, referring texts, {how}"] - numbers[f"influence, unrelated texts, {how}"]
        for how in ("found heads", "heads by chance")
    )
    return found_gap - chance_gap, numbers


CLAIM = Claim(
    key="P022",
    method="AttentionInfluence",
    says="The relative rise of a small model's loss when the heads that retrieve are masked singles out the texts that "
    "need reasoning over their context.",
    paper_number="1.4 to 3.5 points on five benchmarks for a 7B model trained on what was selected (abstract)",
    setup=f"SmolLM2-135M-Instruct, the twentieth of heads that copy {COPY} random tokens best, others each seed; "
    f"{TEXTS} texts a seed that come back to {FACTS} numbers they gave, and the same with other numbers there: how "
    "much higher the first score, against as many other heads drawn anew each seed. That texts are told apart is "
    "tested, not what training on them gives. (Measured before with one fit for all seeds: +0.047, holds.)",
    effect="relative rise of the loss, referring minus unrelated texts, found heads minus heads by chance",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
