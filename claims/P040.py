"""SoftPAG: does guidance by the heads that HeadHunter finds beat guidance by other heads, in a language model?"""

from __future__ import annotations

import random
import statistics
from typing import Any

import torch

from claims._loaded import padding_left
from claims.ledger import Claim, run
from claims.P283 import OPPOSITES
from heedful import Prompt, attach, fit
from heedful.methods.intervene.diffusion.soft_pag import Heads, SoftPAG

SHOTS, LEARN, TEST, AMONG, ROUNDS, DRAWS = 2, 6, 12, 16, 2, 2


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = padding_left()
    draw = random.Random(seed)
    pairs = [tuple(pair.split()) for pair in OPPOSITES.split(",")]
    draw.shuffle(pairs)
    pool = pairs[LEARN + TEST :]

    def batch(asked: list[tuple[str, ...]]) -> dict[str, Any]:
        shots = ["".join(f"{a}: {b}\n" for a, b in draw.sample(pool, SHOTS)) for _ in asked]
        texts = [f"{few}{a}:" for few, (a, _) in zip(shots, asked, strict=True)]
        target = torch.tensor([tokenizer(f" {b}").input_ids[0] for _, b in asked])
        return {**tokenizer(texts, return_tensors="pt", padding=True), "target": target}

    learn, test = batch(pairs[:LEARN]), batch(pairs[LEARN : LEARN + TEST])
    config = model.config
    every = [(i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads)]
    among = tuple(sorted(draw.sample(every, AMONG)))
    target = test.pop("target")

    @torch.no_grad()
    def sureness(method: SoftPAG) -> float:
        logits = {}
        for name, (_, stack) in method.variants(Prompt((1,))).items():
            with attach(model, stack) as attached:
                logits[name] = attached(**test, logits_to_keep=1).logits[:, -1]
        return -float(torch.nn.functional.cross_entropy(method.combine(logits), target))

    hunted = fit(SoftPAG(rounds=ROUNDS, among=among), model, [learn])

    def others() -> Heads:
        return tuple(draw.sample([pair for pair in among if pair not in hunted.heads], ROUNDS))

    numbers = {
        "log-probability, plain": sureness(SoftPAG(w=0.0)),
        "log-probability, hunted heads": sureness(hunted),
        "log-probability, every head": sureness(SoftPAG()),
        "log-probability, other heads": statistics.fmean(sureness(SoftPAG(heads=others())) for _ in range(DRAWS)),
    }
    better = max(numbers["log-probability, plain"], numbers["log-probability, other heads"])
    return numbers["log-probability, hunted heads"] - better, numbers


CLAIM = Claim(
    key="P040",
    method="SoftPAG",
    says="Guidance by few heads, chosen by the objective, does better than by others, on prompts not searched on.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct instead of a diffusion model: opposites after {SHOTS} examples; {ROUNDS} of {AMONG} "
    f"heads hunted on {LEARN} words, u 0.5, w 1; {TEST} other words, against no guidance and {ROUNDS} other heads of "
    f"the {AMONG} ({DRAWS} draws). Guidance by every head stands in the details.",
    effect="mean log-probability of the answer over the better of no guidance and other heads",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
