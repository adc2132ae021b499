"""SoftInjection: does a fitted task embedding without examples beat a prompt with ten of them?"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from claims._loaded import padding_left
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.methods.intervene.language.soft_injection import SoftInjection

OPPOSITES = (
    "hot cold,big small,up down,old young,fast slow,day night,left right,rich poor,high low,dark light,open closed,"
    "wet dry,hard soft,long short,full empty,early late,happy sad,strong weak,good bad,black white,true false,"
    "first last,inside outside,win lose,love hate,clean dirty,loud quiet,thick thin,wide narrow,deep shallow,"
    "near far,buy sell,push pull,start end,top bottom,male female,north south,east west,sweet bitter,rough smooth"
)
PAST = (
    "go went,see saw,take took,give gave,come came,eat ate,run ran,write wrote,speak spoke,drive drove,sing sang,"
    "drink drank,begin began,break broke,buy bought,bring brought,think thought,catch caught,teach taught,feel felt,"
    "keep kept,sleep slept,leave left,lose lost,meet met,pay paid,say said,sell sold,send sent,spend spent,"
    "stand stood,tell told,win won,find found,hold held,hear heard,make made,build built,know knew,grow grew"
)
TASKS = {"opposites": OPPOSITES, "past tense": PAST}
SHOTS, PROMPTS, LEARN, TEST, STEPS = 10, 6, 12, 14, 24


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = padding_left()
    numbers: dict[str, float] = {}
    for task, words in TASKS.items():
        draw = random.Random(seed)
        pairs = [tuple(pair.split()) for pair in words.split(",")]
        draw.shuffle(pairs)
        # what is tested is seen neither as an example nor in training
        test, learn, pool = pairs[:TEST], pairs[TEST : TEST + LEARN], pairs[TEST:]

        def few(word: str, pool: list[tuple[str, ...]] = pool, draw: random.Random = draw) -> str:
            examples = draw.sample([p for p in pool if p[0] != word], SHOTS)
            return "".join(f"Q: {a}\nA: {b}\n\n" for a, b in examples) + f"Q: {word}\nA:"

        def prompts(texts: list[str]) -> Any:
            return tokenizer(texts, return_tensors="pt", padding=True)

        def answers(found: list[tuple[str, ...]]) -> Tensor:
            return torch.tensor([tokenizer(f" {b}").input_ids[0] for _, b in found])

        @torch.no_grad()
        def accuracy(inputs: Any, method: SoftInjection | None, test: list[tuple[str, ...]] = test) -> float:
            if method is None:
                logits = model(**inputs, logits_to_keep=1).logits
            else:
                with attach(model, method) as attached:
                    logits = attached(**inputs, logits_to_keep=1).logits
            return float((logits[:, -1].argmax(-1) == answers(test)).double().mean())

        shots = prompts([few(word) for word, _ in draw.sample(pool, PROMPTS)])
        bare = [
            {**prompts([f"Q: {word}\nA:" for word, _ in part]), "target": answers(part)}
            for part in (learn[i::3] for i in range(3))
        ]
        method = fit(SoftInjection(steps=STEPS), model, [shots, *bare])
        asked = prompts([f"Q: {word}\nA:" for word, _ in test])
        numbers[f"{task}, no examples"] = accuracy(asked, None)
        numbers[f"{task}, {SHOTS} examples"] = accuracy(prompts([few(word) for word, _ in test]), None)
        numbers[f"{task}, injected"] = accuracy(asked, method)
        numbers[f"{task}, injected by one half"] = accuracy(asked, SoftInjection(method.task, gate=0.5))
        gates = torch.cat([x for name, x in method.task.items() if name[0] == "a"])
        numbers[f"{task}, gates below 0.1 or above 0.9"] = float(((gates < 0.1) | (gates > 0.9)).double().mean())
    gains = [numbers[f"{task}, injected"] - numbers[f"{task}, {SHOTS} examples"] for task in TASKS]
    return sum(gains) / len(gains), numbers


CLAIM = Claim(
    key="P283",
    method="SoftInjection",
    says="Without examples in the prompt, injected task embeddings beat ten examples.",
    paper_number="+10.2% to +14.3% over 10-shot, 57 tasks, 12 models of 4B to 70B parameters",
    setup="SmolLM2-135M, opposites and past tenses, 14 held-out words a task; t from 6 ten-shot prompts (the paper: "
    "50), gates from 24 steps of 4 words (the paper: 400 of 1).",
    effect="first-token accuracy, injected without examples over ten examples",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
