"""LearnableTaskVector: does a fitted task vector stand in for examples, and is the weighting what does it?"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from claims._loaded import padding_left
from claims.ledger import Claim, run
from claims.P283 import OPPOSITES
from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.methods.intervene.language.task_vector import LearnableTaskVector

SHOTS, PROMPTS, LEARN, TEST, STEPS, RATE = 5, 6, 12, 14, 24, 0.1


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = padding_left()
    draw = random.Random(seed)
    pairs = [tuple(pair.split()) for pair in OPPOSITES.split(",")]
    draw.shuffle(pairs)
    test, learn, pool = pairs[:TEST], pairs[TEST : TEST + LEARN], pairs[TEST:]

    def few(word: str) -> str:
        examples = draw.sample([p for p in pool if p[0] != word], SHOTS)
        return "".join(f"Q: {a}\nA: {b}\n\n" for a, b in examples) + f"Q: {word}\nA:"

    def prompts(texts: list[str]) -> Any:
        return tokenizer(texts, return_tensors="pt", padding=True)

    def answers(found: list[tuple[str, ...]]) -> Tensor:
        return torch.tensor([tokenizer(f" {b}").input_ids[0] for _, b in found])

    @torch.no_grad()
    def sureness(inputs: Any, method: LearnableTaskVector | None) -> float:
        if method is None:
            logits = model(**inputs, logits_to_keep=1).logits
        else:
            with attach(model, method) as attached:
                logits = attached(**inputs, logits_to_keep=1).logits
        return -float(torch.nn.functional.cross_entropy(logits[:, -1], answers(test)))

    shots = prompts([few(word) for word, _ in draw.sample(pool, PROMPTS)])
    bare = [
        {**prompts([f"Q: {word}\nA:" for word, _ in part]), "target": answers(part)}
        for part in (learn[i::3] for i in range(3))
    ]
    method = fit(LearnableTaskVector(steps=STEPS, rate=RATE, start=0.0), model, [shots, *bare])
    found = method.vectors
    # the control: vectors of the same length in each layer, by as many heads weighted at random
    other = fit(LearnableTaskVector(steps=1, rate=1e-9, seed=seed), model, [shots, *bare]).vectors
    vectors = {n: x * found[n].norm() / x.norm() for n, x in other.items() if n[0] == "v"}
    asked = prompts([f"Q: {word}\nA:" for word, _ in test])
    numbers = {
        "log-probability, no examples": sureness(asked, None),
        f"log-probability, {SHOTS} examples": sureness(prompts([few(word) for word, _ in test]), None),
        "log-probability, task vector": sureness(asked, method),
        "log-probability, heads weighted at random": sureness(asked, LearnableTaskVector(Fitted(vectors))),
    }
    plain, control = numbers["log-probability, no examples"], numbers["log-probability, heads weighted at random"]
    return numbers["log-probability, task vector"] - max(plain, control), numbers


CLAIM = Claim(
    key="P260",
    method="LearnableTaskVector",
    says="One vector of weighted heads carries the task: prompts without examples get the answers of prompts with.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct, opposites, {TEST} held-out words; mean heads of {PROMPTS} prompts of {SHOTS} "
    f"examples, weights from {STEPS} steps of 4 words at rate {RATE}, from 0 (the authors' code: 2000 steps of 32 at "
    "5e-5, from random weights). Control: heads weighted at random, vectors of the same length.",
    effect="mean log-probability of the answer over the better of no edit and the control",
    measure=measure,
    strong=0.5,
)

if __name__ == "__main__":
    run(CLAIM)
