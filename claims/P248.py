"""AttentionRAG: does the beginning of an answer show the sentence that it needs better than the question does?"""

from __future__ import annotations

import random
import statistics

from claims._loaded import default
from claims.ledger import Claim, run
from claims.P125 import NAMES, TOWNS
from heedful import Prompt, arrange
from heedful.methods.sparse.tokens.attention_rag import AttentionRAG

ITEMS, SENTENCES = 16, 10  # a seed; in each item


def item(draw: random.Random) -> tuple[Prompt, Prompt, int]:
    """The same sentences before a question alone and before the beginning of its answer; which of them is wanted."""
    tokenizer = default().tokenizer
    names, towns = draw.sample(NAMES.split(), SENTENCES), draw.sample(TOWNS.split(), SENTENCES)
    tokens: list[int] = tokenizer("Some facts.\n").input_ids
    spans = []
    for name, town in zip(names, towns, strict=True):
        piece = tokenizer(f"{name} was born in {town} and liked it there.\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    place = draw.randrange(SENTENCES)
    question = f"Question: Where was {names[place]} born?\nAnswer:"
    roles = {"documents": tuple(spans)}
    plain, hinted = (
        Prompt((*tokens, *tokenizer(text).input_ids), roles)
        for text in (question, f"{question} {names[place]} was born in")
    )
    return plain, hinted, place


def found(prompt: Prompt, place: int) -> tuple[float, float]:
    """Whether the wanted sentence stays, and the share of sentences that do."""
    start, stop = prompt.roles["documents"][place]
    left = arrange(default().model, prompt, AttentionRAG(top=1))
    kept = [left.tokens[a:b] for a, b in left.roles["documents"]]
    return float(prompt.tokens[start:stop] in kept), len(kept) / SENTENCES


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw, rows = random.Random(seed), []
    for _ in range(ITEMS):
        plain, hinted, place = item(draw)
        row: dict[str, float] = {}
        for name, prompt in (("question", plain), ("hint", hinted)):
            row[f"wanted sentence kept, {name}"], row[f"sentences kept, {name}"] = found(prompt, place)
        rows.append(row)
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return numbers["wanted sentence kept, hint"] - numbers["wanted sentence kept, question"], numbers


CLAIM = Claim(
    key="P248",
    method="AttentionRAG",
    says="Where a question is turned into the beginning of its answer, the attention of the next word shows which "
    "sentences of the context it needs.",
    paper_number="up to 6.3 times shorter contexts, about 10% above LLMLingua in key metrics (abstract)",
    setup=f"SmolLM2-135M, {ITEMS} prompts a seed of {SENTENCES} sentences about births, all of one shape, and a "
    "question on one of them; one token chooses, so that one sentence stays: how often it is the wanted one, after the "
    "beginning of the answer against after the question alone. One in ten by chance.",
    effect="share of prompts in which the wanted sentence stays, hint minus question",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
