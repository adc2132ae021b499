"""ReReading: is the answer surer where the question stands twice?"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims.ledger import Claim, run
from claims.P125 import NAMES, TOWNS
from heedful import Method, Prompt, arrange, attach
from heedful.authoring import Call, Mask, Paper, Site, at
from heedful.core.mask import Where
from heedful.core.method import Stack
from heedful.methods import ReReading

ITEMS, TOLD = 12, 4  # questions a seed; people whose town is told, and as many who live with one of them
LEAD = "\nRead the question again: "


class _Apart(Method):
    """Later copies of the question see nothing of the first."""

    paper = Paper("P063", "a control", "none", 2026)

    @at(Site.MASK)
    def part(self, mask: Mask, call: Call) -> Mask:
        (a, b), (c, d) = call.region("question")

        def seen(q: Tensor, k: Tensor) -> Tensor:
            return ~((q >= c) & (q < d) & (k >= a) & (k < b))

        return mask & Where(seen)


def item(chance: random.Random, steps: int) -> tuple[Prompt, list[int], int]:
    """A question of one step or two, the first tokens of the towns that it names, and which of them is right."""
    tokenizer: Any = default().tokenizer
    towns = chance.sample(TOWNS.split(), TOLD)
    people = chance.sample(NAMES.split(), 2 * TOLD)
    told, guests = people[:TOLD], people[TOLD:]
    hosts = chance.sample(range(TOLD), TOLD)
    lines = [f"{name} lives in {town}." for name, town in zip(told, towns, strict=True)]
    lines += [f"{guest} lives with {told[host]}." for guest, host in zip(guests, hosts, strict=True)]
    chance.shuffle(lines)
    asked = chance.randrange(TOLD)
    name, right = (told[asked], asked) if steps == 1 else (guests[asked], hosts[asked])
    begin = tokenizer("Q: ").input_ids
    question = tokenizer(" ".join(lines) + f" In which town does {name} live?").input_ids
    end = tokenizer(f"\nA: {name} lives in").input_ids
    spans = {"question": ((len(begin), len(begin) + len(question)),)}
    options = [tokenizer(" " + town).input_ids[0] for town in towns]
    return Prompt((*begin, *question, *end), spans), options, right


@torch.no_grad()
def sureness(prompt: Prompt, options: list[int], right: int, apart: bool = False) -> float:
    """The log-probability of the right town, among those named."""
    with attach(default().model, _Apart() if apart else Stack(), roles=prompt.roles) as attached:
        logits = attached(input_ids=torch.tensor([prompt.tokens])).logits[0, -1]
    return float(logits[options].log_softmax(-1)[right])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    chance = random.Random(63_000 + seed)
    lead = tuple(default().tokenizer(LEAD).input_ids)
    numbers: dict[str, float] = {}
    for steps, kind in ((1, "one step"), (2, "two steps")):
        for _ in range(ITEMS):
            prompt, options, right = item(chance, steps)
            twice = arrange(default().model, prompt, ReReading(lead))
            found = {
                "once": sureness(prompt, options, right),
                "twice": sureness(twice, options, right),
                "twice, the copy apart": sureness(twice, options, right, apart=True),
            }
            for name, value in found.items():
                key = f"log-probability, {kind}, {name}"
                numbers[key] = numbers.get(key, 0.0) + value / ITEMS
    return numbers["log-probability, one step, twice"] - numbers["log-probability, one step, once"], numbers


CLAIM = Claim(
    key="P063",
    method="ReReading",
    says="Asking a question a second time, with the words Read the question again before it, improves the answer.",
    paper_number="none in the abstract; consistent gains",
    setup=f"SmolLM2-135M-Instruct; {ITEMS} questions a seed, each seed with its own: four people live in towns, four "
    "others each with one of them; where does one of the first four live? Once, and twice as the authors do. In the "
    "details also where one of the others lives, a question of two steps; these were tried first, with one seed, and "
    "left when the model turned out to answer them worse than by chance. And twice with the first copy hidden from the "
    "second, so that nothing is read with the question known.",
    effect="log-probability of the right town among the four named, read twice minus once",
    measure=measure,
    seeds=8,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
