"""ACT: do heads that gain on one half of a quiz when their inner sinks lose weight help on the other half?

A first quiz, capitals, was answered without a fault before any edit and could show nothing; months replaced it once.
"""

from __future__ import annotations

import random
from calendar import month_name
from typing import Any

import torch
from torch import Tensor

from claims._loaded import padding_left
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.core.method import Method, Scoped, Stack
from heedful.methods.intervene.language.act import ACT

MONTHS = list(month_name)[1:]
STEPS = {"one month before": -1, "one month after": 1, "two months after": 2, "three months after": 3}
ANSWERS = {f"{step} {month}": MONTHS[(i + by) % 12] for i, month in enumerate(MONTHS) for step, by in STEPS.items()}
SHOTS, HALF, TRIES = 3, 16, 6


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = padding_left()
    draw = random.Random(seed)
    questions = draw.sample(sorted(ANSWERS), SHOTS + 2 * HALF)
    shots = "".join(f"Question: What is {q}?\nAnswer: {ANSWERS[q]}\n\n" for q in questions[:SHOTS])

    def first_token(month: str) -> int:
        return int(tokenizer(" " + month).input_ids[0])

    def half(names: list[str]) -> tuple[Any, Tensor]:
        """The prompts, and four options each, the right one first."""
        options = []
        for name in names:
            right = first_token(ANSWERS[name])
            wrong = [first_token(month) for month in MONTHS if month not in (ANSWERS[name], name.split()[-1])]
            options.append([right, *draw.sample(wrong, 3)])
        prompts = [f"{shots}Question: What is {name}?\nAnswer:" for name in names]
        return tokenizer(prompts, return_tensors="pt", padding=True), torch.tensor(options)

    @torch.no_grad()
    def score(what: Stack | Method | Scoped) -> tuple[float, float]:
        """Mean log-probability of the right option in the test half, and accuracy."""
        inputs, options = test
        with attach(model, what) as attached:
            logits = attached(**inputs, logits_to_keep=1).logits
        chance = logits[:, -1].gather(-1, options).log_softmax(-1)
        return float(chance[:, 0].mean()), float((chance.argmax(-1) == 0).double().mean())

    learn, test = half(questions[SHOTS : SHOTS + HALF]), half(questions[SHOTS + HALF :])
    method = fit(ACT(tries=TRIES), model, [{**learn[0], "options": learn[1]}])
    plain, accuracy = score(Stack())
    numbers = {"log-probability without": plain, "accuracy without": accuracy, "heads kept": float(len(method.heads))}
    for name, what in (("kept heads", method), ("every head", ACT().on(layers=range(2, 29)))):
        numbers[f"log-probability, {name}"], numbers[f"accuracy, {name}"] = score(what)
    better = max(plain, numbers["log-probability, every head"])
    return numbers["log-probability, kept heads"] - better, numbers


CLAIM = Claim(
    key="P003",
    method="ACT",
    says="Turning down sinks inside the text, in heads chosen on calibration data, raises the score of right options.",
    paper_number="up to +7.30% average accuracy over data sets (Llama-30B)",
    setup="SmolLM2-135M, counting months with 3 examples and 4 options, 16 questions to choose heads and 16 to test; "
    "only the 6 heads with the most inner sinks are tried, one by one, where the paper tries every head. Against no "
    "edit and against ACT in every head, whichever is better. There are 48 questions, so that seeds share many. (A "
    "first quiz, capitals, was at 100% without ACT and was given up. Judged before against no edit alone, which lay "
    "below the kept heads in every draw: +0.067, holds; in one draw of eight ACT in every head does better than both.)",
    effect="log-probability of the right option on the other half, above that with no edit or in every head",
    measure=measure,
    seeds=8,
    strong=0.02,
)


if __name__ == "__main__":
    run(CLAIM)
