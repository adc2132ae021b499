"""TempScale: does a temperature below 1 keep the embeddings of long texts apart?"""

from __future__ import annotations

import random
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from claims._loaded import encoder
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.intervene.language.temp_scale import TempScale

TAU = 0.9
SHORT, MIDDLE, LONG = 16, 64, 192  # tokens of text
TEXTS = 24


def embed(ids: Tensor, tau: float) -> tuple[Tensor, list[float]]:
    """Mean-pooled unit embeddings, and the share of each layer's states that is not their mean over tokens."""
    model = encoder().model
    with torch.no_grad():
        if tau == 1:
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        else:
            with attach(model, TempScale(tau)) as attached:
                states = attached(input_ids=ids, output_hidden_states=True).hidden_states
    high = [float(((x - x.mean(1, keepdim=True)).norm(dim=(1, 2)) / x.norm(dim=(1, 2))).mean()) for x in states[1:]]
    return torch.nn.functional.normalize(states[-1].mean(1), dim=-1), high


def cosine(x: Tensor) -> float:
    """The mean over pairs of different texts."""
    return float(((x @ x.T).sum() - len(x)) / (len(x) * (len(x) - 1)))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    tokenizer: Any = encoder().tokenizer
    found = [
        tokenizer(text, add_special_tokens=False, truncation=True, max_length=2 * LONG).input_ids
        for _, text in sorted(topics.items())
    ]
    found = [ids for ids in found if len(ids) >= 2 * LONG]
    chosen = random.Random(seed).sample(found, TEXTS)

    def batch(start: int, n: int) -> Tensor:
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        return torch.tensor([[first, *ids[start : start + n], last] for ids in chosen])

    numbers: dict[str, float] = {}
    for tau in (1.0, TAU):
        for n in (SHORT, MIDDLE, LONG):
            x, high = embed(batch(0, n), tau)
            numbers[f"cosine, {n} tokens, tau {tau:g}"] = cosine(x)
            numbers[f"high frequencies in the last layer, {n} tokens, tau {tau:g}"] = high[-1]
        y, _ = embed(batch(LONG, LONG), tau)
        right = (x @ y.T).argmax(-1) == torch.arange(TEXTS)
        numbers[f"second half found by the first, tau {tau:g}"] = float(right.float().mean())
    numbers["collapse with length"] = (
        numbers[f"cosine, {LONG} tokens, tau 1"] - numbers[f"cosine, {SHORT} tokens, tau 1"]
    )
    return numbers[f"cosine, {LONG} tokens, tau 1"] - numbers[f"cosine, {LONG} tokens, tau {TAU:g}"], numbers


CLAIM = Claim(
    key="P086",
    method="TempScale",
    says="Embeddings of long texts collapse together; a temperature below 1 weakens that and helps retrieval.",
    paper_number="+0.53% over 40 MTEB data sets, +0.82% on 4 of LongEmbed (arXiv v1)",
    setup="MiniLM-L6, 24 of Python's help texts a seed, cut to 16, 64 and 192 tokens, tau 0.9 against 1, not searched; "
    "the collapse alone, with one small retrieval task beside it.",
    effect="fall of the mean pairwise cosine of 192-token embeddings",
    measure=measure,
    strong=0.01,
)


if __name__ == "__main__":
    run(CLAIM)
