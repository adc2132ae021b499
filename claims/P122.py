"""AttentionBuckets: do several rotary bases together lift the place in the context that the model reads worst?"""

from __future__ import annotations

import random
from typing import Any

import torch

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import Prompt, attach
from heedful.methods.intervene.language.attention_buckets import AttentionBuckets

PAIRS, PLACES, ITEMS = 14, (0, 4, 9, 13), 2  # in each prompt; where the wanted pair stands; for each place and seed
WORDS = (
    "river candle window planet garden bottle market silver engine letter bridge pocket button summer rocket mirror "
    "valley doctor orange basket tunnel hammer carpet finger ticket guitar forest island pencil shadow castle dragon"
)
OWN = 100000.0  # SmolLM2's base; the authors' bases stand in the same proportion to it as to Llama 2's
BUCKETS = AttentionBuckets(OWN, tuple(base * OWN / 10000 for base in AttentionBuckets().bases))


def item(chance: random.Random, place: int) -> tuple[Prompt, int]:
    """A list of pairs that ends in the key at `place`, and the first token of its value."""
    tokenizer: Any = default().tokenizer
    words = chance.sample(WORDS.split(), 2 * PAIRS)
    pairs = list(zip(words[:PAIRS], words[PAIRS:], strict=True))
    key, value = pairs[place]
    text = "".join(f"{k}: {v}\n" for k, v in pairs) + f"\n{key}:"
    return Prompt(tuple(tokenizer(text).input_ids)), tokenizer(" " + value).input_ids[0]


@torch.no_grad()
def sureness(prompt: Prompt, answer: int) -> dict[str, float]:
    """The answer's log-probability from each run and from all together."""
    logits = {}
    for name, (shown, stack) in BUCKETS.variants(prompt).items():
        with attach(default().model, stack) as attached:
            logits[name] = attached(input_ids=torch.tensor([shown.tokens])).logits[0, -1]
    found = {**logits, "together": BUCKETS.combine(logits)}
    return {name: float(x.log_softmax(-1)[answer]) for name, x in found.items()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    chance = random.Random(seed)
    by_place = []
    for place in PLACES:
        each = [sureness(*item(chance, place)) for _ in range(ITEMS)]
        by_place.append({name: sum(x[name] for x in each) / ITEMS for name in each[0]})
    worst = {name: min(x[name] for x in by_place) for name in by_place[0]}
    mean = {name: sum(x[name] for x in by_place) / len(PLACES) for name in by_place[0]}
    numbers = {f"log-probability at the worst place, {name}": x for name, x in worst.items()}
    numbers |= {f"mean log-probability, {name}": mean[name] for name in (f"base {OWN}", "together")}
    return worst["together"] - worst[f"base {OWN}"], numbers


CLAIM = Claim(
    key="P122",
    method="AttentionBuckets",
    says="Runs with several rotary bases fill each other's attention troughs, so that no place in the context is "
    "overlooked; a 7B model reaches GPT-4 on the largest tool-use benchmark.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M-Instruct, 14 key-value pairs of words with the wanted one at place 1, 5, 10 or 14, 2 items for "
    "each a seed; the authors' 6 bases, scaled to this model's 100,000. About 70 tokens, where the paper looks at "
    "1,000 to 4,000.",
    effect="log-probability of the value at the worst place, together minus the model's own base",
    measure=measure,
    strong=0.05,
)


if __name__ == "__main__":
    run(CLAIM)
