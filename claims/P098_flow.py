"""AttentionFlow: does it tell better than raw attention which tokens an encoder's answer rests on?"""

from __future__ import annotations

from dataclasses import replace

import torch

from claims import P098
from claims._texts import sentences
from claims.ledger import run
from heedful.explaining.attribution import attribute
from heedful.methods.explain.attention_flow import AttentionFlow

SENTENCES = 15  # a seed


def scores(sentence: str) -> dict[str, float]:
    """What P098 has, and flow's rank correlation."""
    model, tokenizer, _ = P098.encoder()
    ids = tokenizer(sentence, return_tensors="pt").input_ids
    found = attribute(model, ids, AttentionFlow())[P098.words_of(ids)]
    return P098.scores(sentence) | {"flow": P098.spearman(found, P098.importance(ids))}


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    each = [scores(sentence) for sentence in sentences(seed, SENTENCES)]
    numbers = {f"rank correlation, {name}": sum(s[name] for s in each) / len(each) for name in each[0]}
    last = max(name for name in numbers if "raw" in name)
    return numbers["rank correlation, flow"] - numbers[last], numbers


CLAIM = replace(
    P098.CLAIM,
    key="P098_flow",
    method="AttentionFlow",
    setup=P098.CLAIM.setup.replace("40 sentences", "15 sentences").replace("rollout against", "flow against"),
    effect="Spearman correlation, flow minus raw attention of the last layer",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
