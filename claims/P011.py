"""BestOrder: is the answer surer under the order of documents in which one of them gets the most attention?"""

from __future__ import annotations

import random
import statistics
from typing import Any

import torch

from claims._loaded import default
from claims.ledger import Claim, run
from claims.P125 import LEAD, NAMES, TOWNS
from heedful import Prompt, attach
from heedful.methods.intervene.language._documents import _DocumentAttention

ITEMS, ORDERS, CHAINS = 5, 8, 4  # questions a seed, orders of each, pairs of documents in each


def item(chance: random.Random) -> tuple[Prompt, list[int]]:
    """A question of two hops; documents 0 and 1 answer it, and the first tokens of towns begin with the right one's."""
    tokenizer: Any = default().tokenizer
    names, towns = chance.sample(NAMES.split(), 2 * CHAINS), chance.sample(TOWNS.split(), CHAINS)
    tokens: list[int] = tokenizer(LEAD).input_ids
    spans = []
    for pupil, teacher, town in zip(names[::2], names[1::2], towns, strict=True):
        for fact in (f"The teacher of {pupil} is {teacher}.", f"{teacher} was born in {town}."):
            piece = tokenizer(f"DOCUMENT: {fact}\n\n").input_ids
            spans.append((len(tokens), len(tokens) + len(piece)))
            tokens += piece
    question = (
        f"### Question\nWhere was the teacher of {names[0]} born?\n\n### Answer\nThe teacher of {names[0]} was born in"
    )
    options = [tokenizer(" " + town).input_ids[0] for town in towns]
    return Prompt((*tokens, *tokenizer(question).input_ids), {"documents": tuple(spans)}), options


@torch.no_grad()
def read(prompt: Prompt, options: list[int]) -> tuple[float, float]:
    """The peak of attention, and the log-probability of the right town among those named."""
    reader = _DocumentAttention("documents", len(prompt) - 1)
    with attach(default().model, reader, roles=prompt.roles) as attached:
        logits = attached(input_ids=torch.tensor([prompt.tokens]), use_cache=False).logits[0, -1]
        return float(attached[reader].max()), float(logits[options].log_softmax(-1)[0])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    chance = random.Random(11_000 + seed)
    rows = []
    for _ in range(ITEMS):
        prompt, options = item(chance)
        orders = [tuple(chance.sample(range(2 * CHAINS), 2 * CHAINS)) for _ in range(ORDERS)]
        found = [read(prompt.reordered("documents", order), options) for order in orders]
        sure = [x for _, x in found]
        ranked = sorted(found)
        forward = [x for order, x in zip(orders, sure, strict=True) if order.index(0) < order.index(1)]
        backward = [x for order, x in zip(orders, sure, strict=True) if order.index(0) > order.index(1)]
        rows.append({
            "highest peak": ranked[-1][1],
            "lowest peak": ranked[0][1],
            "all orders": statistics.fmean(sure),
            "orders along the chain": statistics.fmean(forward or sure),
            "orders against it": statistics.fmean(backward or sure),
        })  # fmt: skip
    numbers = {f"log-probability, {name}": statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return numbers["log-probability, highest peak"] - numbers["log-probability, all orders"], numbers


CLAIM = Claim(
    key="P011",
    method="BestOrder",
    says="Of random orders of the documents, the one in which a document draws the highest peak of attention is "
    "answered better than the others are on average.",
    paper_number="28.6 % to 33.7 % right, Qwen 2.5 7B",
    setup=f"SmolLM2-135M-Instruct; {ITEMS} questions of two hops a seed, each seed with its own (four pupils, their "
    f"teachers, and where these were born, {2 * CHAINS} documents of a line each), {ORDERS} random orders of each. In "
    "the details also the order with the lowest peak, and orders in which the chain's first document stands before its "
    "second or behind it.",
    effect="log-probability of the right town among those named, under the order of the highest peak, above the mean "
    "over all orders tried",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
