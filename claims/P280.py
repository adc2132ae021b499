"""SpecPC: do the early layers of a model, as its draft, know which tokens of a prompt its answer needs?"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from claims._cache import Reading, losses, questions
from claims._loaded import default
from claims.ledger import Claim, run
from heedful import Prompt, arrange
from heedful.core.kinds.tokens import Reader
from heedful.methods.sparse.tokens.spec_pc import SpecPC

WORDS, QUESTIONS = 30, 2
HOW = {"window": 16, "kernel": 8, "near": 8}
BUDGET, FIRST, HALF = 0.5, 4, 15  # layers, of 30


class AnyTokens(SpecPC):
    """The control: the same choice of scores by chance, and so of pieces as large."""

    def scores(self, prompt: Prompt, read: Reader, rows: int) -> Tensor:
        return torch.rand(len(prompt), generator=torch.Generator().manual_seed(len(prompt)))


def shortened(text: Reading, method: SpecPC) -> Reading:
    prompt = arrange(default().model, Prompt(tuple(text.context[0].tolist())), method)
    return Reading(torch.tensor([prompt.tokens]), text.rest, text.counts)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    rows: list[dict[str, float]] = []
    for text in questions(seed, QUESTIONS, WORDS):
        row = {"whole": losses(text, None), "tokens": float(text.context.shape[1])}
        for name, method in (
            ("draft", SpecPC(BUDGET, **HOW, first=FIRST, stop=HALF)),
            ("model", SpecPC(BUDGET, **HOW, first=FIRST)),
            ("chance", AnyTokens(BUDGET, **HOW)),
        ):
            row[name] = losses(shortened(text, method), None)
        rows.append(row)
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return numbers["chance"] - numbers["draft"], numbers


CLAIM = Claim(
    key="P280",
    method="SpecPC",
    says="The attention of a smaller draft tells which tokens of a prompt a model can do without.",
    paper_number="consistently higher accuracy than baselines at the same memory, latency and throughput (abstract)",
    setup=f"SmolLM2-135M, {QUESTIONS} prompts a seed that ask for one of six numbers strewn over prose of about "
    f"{6 * WORDS} words; layers {FIRST} to {HALF - 1} of its 30 as the draft, half of the tokens dropped: the loss of "
    "the answer's digits, against as many tokens in pieces as large, chosen by chance. All layers as the draft are in "
    "the details.",
    effect="nats of loss a digit that asking the draft saves",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
