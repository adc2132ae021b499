"""SystematicOutliers: are tokens with massive activations the ones that draw the attention?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.observe.systematic_outliers import SystematicOutliers

TEXTS, TOKENS = 4, 256  # a seed


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    ids = torch.tensor([tokenizer(text).input_ids[:TOKENS] for text in passages(seed, TEXTS, TOKENS)])
    with attach(model, SystematicOutliers()) as attached, torch.no_grad():
        for row in ids:
            attached(input_ids=row[None])
        found = attached[SystematicOutliers()]
    total = found.total
    tokens = total.texts * TOKENS
    massive = total.both / max(1.0, total.activation)
    plain = (total.attention - total.both) / (tokens - total.activation)
    numbers = {
        "massive tokens that draw attention": massive,
        "other tokens that draw attention": plain,
        "attention outliers that are massive": total.explained,
        "of these at the first token": total.first / max(1.0, total.both),
        "layers with massive tokens": float(sum(c.activation > 0 for c in found.layers.values())),
    }
    return massive - plain, numbers


CLAIM = Claim(
    key="P004",
    method="SystematicOutliers",
    says="Outliers of weights, activations and attention are one phenomenon: they stand at the same places, arise from "
    "softmax and act as scaling factors that depend on context.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct, 4 of Python's help texts a seed cut to 256 tokens, the paper's thresholds. Only that "
    "activations and attention are outliers at the same tokens is tested, not the cause.",
    effect="share of tokens that draw attention, massive ones minus others",
    measure=measure,
    strong=0.5,
)


if __name__ == "__main__":
    run(CLAIM)
