"""MassiveQK: do queries and keys have massive dimensions, values not, and do they turn slowly?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.call import Call
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.methods.observe.massive_qk import MassiveQK

TEXTS, TOKENS = 4, 256  # a seed


class Values(Method):
    """The same norm over tokens for values, for this experiment only."""

    paper = MassiveQK.paper

    @reads(Site.VALUE)
    def measure(self, value: Tensor, call: Call) -> Sum:
        return Sum.of(value.square().sum((0, 2)))


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    with attach(model, MassiveQK() | Values()) as attached, torch.no_grad():
        for text in passages(seed, TEXTS, TOKENS):
            attached(input_ids=torch.tensor([tokenizer(text).input_ids[:TOKENS]]))
        found, values = attached[MassiveQK()], attached[Values()]
    sizes = torch.stack([x.value.sqrt() for x in values.values()])
    plain = (sizes.amax(-1) / sizes.mean(-1)).mean()
    query, key = (float(x.mean()) for x in (found.query_ratio, found.key_ratio))
    massive = found.dimensions(found.query) + found.dimensions(found.key)
    heads = sum(massive.values())
    turns = found.period[0]  # alike in all layers
    slow = sum(n for d, n in massive.items() if turns[d] > turns.median())
    numbers = {
        "largest over mean dimension, queries": query,
        "largest over mean dimension, keys": key,
        "largest over mean dimension, values": float(plain),
        "heads with massive queries": float((found.query_ratio > found.times).double().mean()),
        "heads with massive keys": float((found.key_ratio > found.times).double().mean()),
        "heads with massive values": float((sizes.amax(-1) > found.times * sizes.mean(-1)).double().mean()),
        "massive dimensions in the slower half of turns": slow / max(1, heads),
    }
    return (query + key) / 2 - float(plain), numbers


CLAIM = Claim(
    key="P180",
    method="MassiveQK",
    says="Massive values stand in few, slowly turning dimensions of queries and keys and not in values, come from the "
    "rotary embedding, and disrupting them hurts what is read from context far more than recall.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct, 4 of Python's help texts a seed cut to 256 tokens; the norm over tokens of each "
    "head's largest dimension over its mean one. Where they are is tested, not what disrupting them does.",
    effect="largest over mean dimension, queries and keys minus values",
    measure=measure,
    strong=1.0,
)


if __name__ == "__main__":
    run(CLAIM)
