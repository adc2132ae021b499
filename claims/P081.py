"""Impermissible: can a model be trained to use a token without looking at it?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Site, reads
from heedful.core.method import Method, Stack
from heedful.core.stats import Mean
from heedful.methods import Impermissible

LENGTH, ROWS, STEPS, UNSEEN = 12, 32, 300, 512
CLS, GONE, WORDS = 1, 2, (3, 4)  # the first token; what is put in a word's place; the words that are the label
VOCABULARY = 40


class _Mass(Method):
    """How much the first token attends to the words, the mean over texts and heads."""

    paper = Impermissible.paper

    @reads(Site.PATTERN)
    def read(self, pattern: Tensor, call: Call) -> Mean:
        first = (call.q_pos == 0).expand(len(pattern), 1, -1)
        mass = (pattern * call.marked("impermissible")[:, :, None]).sum(-1)
        return Mean.of((mass * first).sum(), float(first.sum()) * pattern.shape[1])


def texts(draw: torch.Generator, rows: int) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Ids, labels, and where the word is that tells the label."""
    ids = torch.randint(5, VOCABULARY, (rows, LENGTH), generator=draw)
    ids[:, 0] = CLS
    labels = torch.randint(0, 2, (rows,), generator=draw)
    place = torch.randint(1, LENGTH, (rows,), generator=draw)
    ids[torch.arange(rows), place] = torch.tensor(WORDS)[labels]
    return ids, labels, [{"impermissible": ((n, n + 1),), "cls": ((0, 1),)} for n in place.tolist()]


def fresh(seed: int) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=LENGTH, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def trained(model: Any, seed: int, coefficient: float) -> Any:
    """A copy of the model, trained further."""
    model = copy.deepcopy(model).train()
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    what = Impermissible(coefficient, asking="cls") if coefficient else Stack()
    with attach(model, what, roles=texts(draw, 1)[2]) as attached:
        for _ in range(STEPS):
            ids, labels, roles = texts(draw, ROWS)
            attached.roles = roles
            optimiser.zero_grad()
            attached(input_ids=ids, labels=labels).loss.backward()
            optimiser.step()
    return model.eval()


@torch.no_grad()
def judged(model: Any, seed: int) -> tuple[float, float, float]:
    """Accuracy, the same with the words gone, and the attention that they get."""
    ids, labels, roles = texts(torch.Generator().manual_seed(5000 + seed), UNSEEN)
    gone = ids.where((ids != WORDS[0]) & (ids != WORDS[1]), GONE)
    with attach(model, _Mass(), roles=roles) as attached:
        found = attached(input_ids=ids).logits.argmax(-1)
        mass = sum(float(x.value) for x in attached[_Mass()].values()) / 2
    without = model(input_ids=gone).logits.argmax(-1)
    return float((found == labels).float().mean()), float((without == labels).float().mean()), mass


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers, gaps, learned = {}, [], trained(fresh(seed), seed, 0.0)
    for word, coefficient in (("plain", 0.0), ("with the penalty", 1.0)):
        right, without, mass = judged(trained(learned, 1000 + seed, coefficient), seed)
        numbers |= {
            f"accuracy, {word}": right,
            f"accuracy without the words, {word}": without,
            f"attention on the words, {word}": mass,
        }
        gaps.append((right - without) / (1 - without) - mass)
    return gaps[1] - gaps[0], numbers


CLAIM = Claim(
    key="P081",
    method="Impermissible",
    says="Attention on impermissible tokens can be trained away at little cost, and the model uses them all the same.",
    paper_number="none in the abstract, which says surprisingly little cost in accuracy",
    setup=f"Encoders of 2 layers that have learned in {STEPS} steps to tell which of two words stands somewhere among "
    f"{LENGTH} tokens, trained {STEPS} steps further with and without the penalty on the first token's attention to "
    f"it; {UNSEEN} unseen texts. Use is the share of what can be lost that is lost when another token stands there. A "
    "first set-up trained from scratch: nothing was learned under the penalty, and its measure took that for "
    "success; both were changed once that was seen.",
    effect="how much further use exceeds attention with the penalty than without (shares of 1)",
    measure=measure,
    seeds=8,
)


if __name__ == "__main__":
    run(CLAIM)
