"""SADR: does an edit that may not draw attention to its subject spare other facts that follow the subject?"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims.ledger import Claim, run
from claims.P294 import TRUTHS
from heedful import attach, fit
from heedful.methods.intervene.language.sadr import SADR

EDITS, OTHERS, LAYER, STEPS, RATE, ENOUGH = 2, 6, 5, 25, 0.5, 0.9
LEAD, SUBJECT = "The capital of", 3  # where the subject begins, after the words of the lead


@contextmanager
def pushed(delta: Tensor, at: int) -> Iterator[None]:
    """The model with a vector on top of one feed-forward block's output at the subject's last token, as in ROME."""

    def push(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + delta * (torch.arange(out.shape[1]) == at)[:, None]

    loaded: Any = default().model
    handle = loaded.model.layers[LAYER].mlp.register_forward_hook(push)
    try:
        yield
    finally:
        handle.remove()


def edited(prompt: Tensor, subject: int, target: int, weight: float) -> tuple[Tensor, float]:
    """The vector that makes the target likely enough, and how likely that is."""
    plain: Any = default().model
    roles = {"subject": ((SUBJECT, subject + 1),)}
    penalty = fit(SADR(weight), plain, [{"input_ids": prompt, "roles": roles}])
    delta = torch.zeros(plain.config.hidden_size, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=RATE)
    chance = 0.0
    with pushed(delta, subject), attach(plain, penalty, roles=roles) as attached:
        for _ in range(STEPS):
            found = attached(input_ids=prompt, use_cache=False).logits[0, -1].log_softmax(-1)[target]
            chance = math.exp(found.item())
            if chance > ENOUGH:
                break
            optimiser.zero_grad()
            (delta.grad,) = torch.autograd.grad((attached.loss() if weight else 0.0) - found, [delta])
            optimiser.step()
    return delta.detach(), chance


def measure(seed: int) -> tuple[float, dict[str, float]]:
    loaded: Any = default()
    draw = random.Random(seed)
    pairs = [pair.split() for pair in TRUTHS.split(",")]
    mine = random.Random(0).sample(pairs, len(pairs))[EDITS * seed : EDITS * (seed + 1)]
    ways = {"no penalty": 0.0, "penalty": 0.01}
    numbers: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        numbers[name] = numbers.get(name, 0.0) + value / EDITS

    def first(city: str) -> int:
        return int(loaded.tokenizer(f" {city}").input_ids[0])

    for country, own in mine:
        others = draw.sample([pair for pair in pairs if pair[0] != country], OTHERS)
        lie = draw.choice([city for _, city in pairs if city != own])
        start = loaded.tokenizer(f"{LEAD} {country}").input_ids
        prompt = torch.tensor([loaded.tokenizer(f"{LEAD} {country} is").input_ids])
        asked = [loaded.tokenizer(f"{LEAD} {country} is {lie}. {LEAD} {name} is").input_ids for name, _ in others]
        for way, weight in ways.items():
            delta, chance = edited(prompt, len(start) - 1, first(lie), weight)
            add(f"chance of the new answer, {way}", chance)
            with torch.no_grad(), pushed(delta, len(start) - 1):
                for ids, (_, truth) in zip(asked, others, strict=True):
                    after = loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                    add(f"log-probability of others' answers, {way}", float(after[first(truth)]) / OTHERS)
                    add(f"log-probability of the lie as others' answer, {way}", float(after[first(lie)]) / OTHERS)
    name = "log-probability of others' answers"
    return numbers[f"{name}, penalty"] - numbers[f"{name}, no penalty"], numbers


CLAIM = Claim(
    key="P005",
    method="SADR",
    says="Restraining the attention that an edited subject draws keeps other facts right where the subject stands "
    "before them.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct, {EDITS} capitals a seed edited as ROME finds its value (a vector at the subject's "
    f"last token after the feed-forward part of layer {LAYER}, until the new answer has {ENOUGH}), with and without "
    f"the penalty; then {OTHERS} other capitals asked for after the edited sentence. No two seeds edit one capital.",
    effect="log-probability of the other answers' first token, with the penalty less without",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
