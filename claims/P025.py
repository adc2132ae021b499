"""SinkRate: do heads of a trained model send their attention to the first token, and those of an untrained one not?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.observe.sink_rate import SinkRate, Sinks

TEXTS, TOKENS = 8, 64  # a seed; the paper's length


def rates(model: Any, ids: Tensor) -> Sinks:
    with attach(model, SinkRate()) as attached, torch.no_grad():
        for row in ids:
            attached(input_ids=row[None])
        return attached[SinkRate()]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    texts = passages(seed, TEXTS, 2 * TOKENS)
    ids = torch.tensor([tokenizer(text).input_ids[:TOKENS] for text in texts])
    noise = torch.randint(tokenizer.vocab_size, ids.shape)
    fresh = type(model)(model.config).eval()  # the same model before training; the seed is set by the ledger
    prose, random, untrained = rates(model, ids), rates(model, noise), rates(fresh, ids)
    others = prose.by_position[1 : TOKENS // 2]  # later ones average too few rows
    numbers = {
        "sink rate of the first token, trained": prose.first,
        "sink rate of the first token, trained, random tokens": random.first,
        "sink rate of the first token, untrained": untrained.first,
        "highest sink rate of tokens 2 to 32, trained": float(others.max()),
        "layers where most heads sink": float(sum(x > 0.5 for x in prose.by_layer().values())),
    }
    return prose.first - untrained.first, numbers


CLAIM = Claim(
    key="P025",
    method="SinkRate",
    says="Attention sinks are universal in pretrained language models and emerge in training; unnormalised sigmoid "
    "attention shows none up to 1B parameters.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct against its own architecture at random weights, 8 of Python's help texts a seed cut "
    "to 64 tokens, epsilon 0.3. Only that sinks come with training is tested, not when, and not the sigmoid part.",
    effect="first-token sink rate, trained minus untrained",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
