"""AttentionSorting: does moving the attended document next to the question help the answer?"""

from __future__ import annotations

import random
from typing import Any

import torch

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import Prompt, arrange
from heedful.methods.intervene.language.attention_sorting import AttentionSorting

ITEMS, DOCUMENTS = 4, 8  # a seed; in each item
NAMES = "Anna Boris Clara David Elena Frank Grace Henry Irene James Karen Louis Maria Peter Sarah Thomas"
TOWNS = "Paris London Berlin Madrid Vienna Prague Dublin Lisbon Athens Oslo Cairo Tokyo Rome Boston Chicago"
LEAD = (
    "Here is some information you will use to answer a question. Some of the information may be irrelevant.\n\n"
    "### Information\n"
)


def item(chance: random.Random, place: int) -> tuple[Prompt, int, int]:
    """A prompt whose true document stands at `place`, the first token of the answer, and which span is the true one."""
    tokenizer: Any = default().tokenizer
    names, towns = chance.sample(NAMES.split(), DOCUMENTS), chance.sample(TOWNS.split(), DOCUMENTS)
    tokens: list[int] = tokenizer(LEAD).input_ids
    spans = []
    for name, town in zip(names, towns, strict=True):
        piece = tokenizer(f"DOCUMENT: {name} was born in {town} and liked it there.\n\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    question = f"### Question\nWhere was {names[place]} born?\n\n### Answer\n{names[place]} was born in"
    answer = tokenizer(" " + towns[place]).input_ids[0]
    return Prompt((*tokens, *tokenizer(question).input_ids), {"documents": tuple(spans)}), answer, place


@torch.no_grad()
def sureness(prompt: Prompt, answer: int) -> float:
    logits = default().model(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
    return float(logits.log_softmax(-1)[answer])


def rank(prompt: Prompt, before: Prompt, place: int) -> int:
    """How many documents stand between the true one and the question."""
    start, stop = before.roles["documents"][place]
    text = before.tokens[start:stop]
    found = [prompt.tokens[a:b] for a, b in prompt.roles["documents"]]
    return DOCUMENTS - 1 - found.index(text)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    chance = random.Random(seed)
    rows: list[dict[str, float]] = []
    for number in range(ITEMS):
        prompt, answer, place = item(chance, (2 * number + seed) % DOCUMENTS)
        shuffled = prompt.reordered("documents", tuple(chance.sample(range(DOCUMENTS), DOCUMENTS)))
        shown = {"as given": prompt, "shuffled": shuffled}
        shown["sorted once"] = arrange(default().model, prompt, AttentionSorting(rounds=1))
        shown["sorted"] = arrange(default().model, shown["sorted once"], AttentionSorting(rounds=2))
        row = {f"log-probability, {name}": sureness(x, answer) for name, x in shown.items()}
        row |= {f"documents after the true one, {name}": rank(x, prompt, place) for name, x in shown.items()}
        rows.append(row)
    numbers = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return numbers["log-probability, sorted"] - numbers["log-probability, as given"], numbers


CLAIM = Claim(
    key="P125",
    method="AttentionSorting",
    says="Sorting documents by the attention they get, the most attended last, improves the answers of long-context "
    "models.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct, the authors' prompt with 8 one-line documents (who was born where), the true one at "
    "every second place in turn, 4 items a seed, 3 rounds; about 170 tokens, where the paper has 1,000 to 30,000.",
    effect="log-probability of the answer's first token, sorted minus as given",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
