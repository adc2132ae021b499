"""InjectedPatterns: do heads that are given a person's patterns find the ends of topics better than heads left free?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Generator, Tensor

from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Mask, Method, Site, at
from heedful.kit.chosen import Chosen
from heedful.methods import InjectedPatterns

END, WORDS = 1, 200  # the token behind a sentence, and how many words there are
SENTENCES, LENGTH, TOPIC = 8, 5, 6  # of a text, words of a sentence, words of a topic
TRAINED, TRIED, STEPS, ROWS = 512, 512, 500, 32
PATTERNS = InjectedPatterns(4, (END,))


class _Elsewhere(Method):
    """The control: heads see as many keys as the patterns leave them, but others: places are shuffled beforehand."""

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:
        placed = PATTERNS.placed(call)
        order = torch.randperm(len(call.keys), generator=Generator().manual_seed(call.layer))
        return mask & Chosen(PATTERNS.chooser(mask, call, lambda part: placed.tables(part)[..., order]))


WAYS = {"free heads": None, "patterns": PATTERNS, "shuffled patterns": _Elsewhere()}


def texts(random: Generator, count: int) -> tuple[Tensor, Tensor]:
    """Texts of two topics `[b n]`, each with words of its own, and where one ends: 1 at that token, -100 at words."""
    words = 2 + torch.rand(count, WORDS, generator=random).argsort(1)[:, : 2 * TOPIC].view(count, 2, TOPIC)
    second = torch.randint(1, SENTENCES, (count, 1), generator=random) <= torch.arange(SENTENCES)
    drawn = torch.randint(TOPIC, (count, SENTENCES, LENGTH), generator=random)
    said = words[torch.arange(count)[:, None], second.long()].gather(2, drawn)
    ids = torch.cat([said, torch.full((count, SENTENCES, 1), END)], 2).flatten(1)
    labels = torch.full((count, SENTENCES, LENGTH + 1), -100)
    labels[:, :-1, -1] = (second[:, 1:] & ~second[:, :-1]).long()  # behind the last sentence nothing is asked
    return ids, labels.flatten(1)


def model(seed: int) -> Any:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=2 + WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=SENTENCES * (LENGTH + 1), num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForTokenClassification(config)


def found(seed: int, what: Method | None) -> float:
    """The share of fresh texts in which the sentence that most likely ends the topic does, after training."""
    random, made = Generator().manual_seed(seed), model(seed)
    ids, labels = texts(random, TRAINED)
    optimiser = torch.optim.AdamW(made.parameters(), lr=2e-3)
    with nullcontext() if what is None else attach(made, what):
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, step / 50) * (1 - step / STEPS)
            rows = torch.randint(TRAINED, (ROWS,), generator=random)
            made(input_ids=ids[rows], labels=labels[rows]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        made.eval()
        ids, labels = texts(random, TRIED)
        with torch.no_grad():
            logits = made(input_ids=ids).logits.diff(dim=-1)[..., 0]
        best = logits.masked_fill(labels < 0, -torch.inf).argmax(1)
        return float((labels.gather(1, best[:, None]) == 1).double().mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {f"share of texts right, {name}": found(seed, what) for name, what in WAYS.items()}
    free, patterns, shuffled = numbers.values()
    return patterns - max(free, shuffled), numbers


CLAIM = Claim(
    key="P175",
    method="InjectedPatterns",
    says="Patterns that people find in trained heads (alike tokens, the own sentence, the next token and the one "
    "before) and inject into the heads of a model make it better at finding where topics end, and at summaries.",
    paper_number="considerable improvements in accuracy and efficiency, as the abstract has it, which gives no numbers",
    setup=f"Made-up texts of {SENTENCES} sentences about two topics, each with {TOPIC} words of its own that no other "
    f"text gives a meaning to; a 2-layer encoder of 4 heads learns from {TRAINED} of them, {STEPS} steps, which "
    "sentence is the last of the first topic. Free heads, heads with the patterns, and heads that see as many keys as "
    f"the patterns leave, elsewhere; {TRIED} fresh texts a seed. Chance is 1 in {SENTENCES - 1}.",
    effect="share of texts right, with patterns less the better of free heads and shuffled patterns",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
