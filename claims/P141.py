"""RetrievalHeads: does a model stop copying a needle without its retrieval heads, and go on without others?"""

from __future__ import annotations

from functools import cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from claims.ledger import Claim, run
from heedful import attach, models
from heedful.core.call import Call
from heedful.core.figures import Head
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.methods.observe.retrieval_heads import Retrieval, RetrievalHeads

OFF = 0.05  # share of heads that is switched off


class Silence(Method):
    """Heads that say nothing."""

    paper = RetrievalHeads.paper

    @at(Site.HEAD_OUTPUT)
    def silence(self, heads: Tensor, call: Call) -> Tensor:
        return torch.zeros_like(heads)


@cache
def trained() -> tuple[Any, Tensor]:
    model, tokenizer, _ = models.default()
    return model, torch.arange(1000, tokenizer.vocab_size)


def scores(method: RetrievalHeads) -> Retrieval:
    model, words = trained()
    with attach(model, method) as attached, torch.no_grad():
        for probe in method.probes(words, 2048):
            attached.roles = probe.roles
            attached(input_ids=probe.tokens, use_cache=False)
        return attached[method]


@torch.no_grad()
def copied(method: RetrievalHeads, off: list[Head]) -> float:
    """Share of the needles' tokens that the model would write, with some heads switched off."""
    model, words = trained()
    without = [Silence().on(layers=n, heads=[h for m, h in off if m == n]) for n in sorted({n for n, _ in off})]
    right, asked = 0, 0
    for probe in method.probes(words, 2048):
        if without:
            with attach(model, reduce(or_, without)) as attached:
                logits = attached(input_ids=probe.tokens, use_cache=False).logits
        else:
            logits = model(probe.tokens, use_cache=False).logits
        for row, predicted, roles in zip(probe.tokens, logits.argmax(-1), probe.roles, strict=True):
            for first, last in roles["answer"]:
                right += int((predicted[first - 1 : last - 1] == row[first:last]).sum())
                asked += last - first
    return right / asked


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, _ = trained()
    one, two = (RetrievalHeads(length=128, texts=1, seed=10 * seed + i) for i in range(2))
    first, second = scores(one), scores(two)
    test = RetrievalHeads(length=128, texts=1, seed=10 * seed + 2)
    every = first.map.numel()
    k = round(OFF * every)
    best = list(first.heads(-1.0))[:k]
    others = [divmod(i, model.config.num_attention_heads) for i in torch.randperm(every).tolist()]
    others = [head for head in others if head not in first.heads(one.threshold)][:k]
    numbers = {
        "copied, all heads": copied(test, []),
        "copied, retrieval heads off": copied(test, best),
        "copied, as many others off": copied(test, others),
        "heads off": float(k),
        "share of heads with a score above 0.1": len(first.heads(one.threshold)) / every,
        "share of heads with score zero": float((first.map == 0).double().mean()),
        "correlation of two halves": float(
            torch.corrcoef(torch.stack([first.map.flatten(), second.map.flatten()]))[0, 1]
        ),
    }
    return numbers["copied, as many others off"] - numbers["copied, retrieval heads off"], numbers


CLAIM = Claim(
    key="P141",
    method="RetrievalHeads",
    says="Under 5 % of heads fetch text from far back; pruning them breaks retrieval, pruning random other heads does "
    "not.",
    paper_number="under 5 % of heads; Llama-2 7B has 12 that are always active",
    setup="SmolLM2-135M-Instruct, random needles of 16 tokens among 128 random tokens at three depths, answers given "
    "token by token; the best 5 % of heads by one set of prompts are silenced on another, against as many heads that "
    "score at most 0.1.",
    effect="share of needle tokens copied, other heads off minus retrieval heads off",
    measure=measure,
    strong=0.2,
)


if __name__ == "__main__":
    run(CLAIM)
