"""Circuit reuse: do the heads that tell who is given something tell the colour of a thing too?"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from claims._loaded import default
from claims.ledger import Claim, run
from heedful.explaining.activation_patching import HeadEffects, patching

PROMPTS, TOP = 12, 20
NAMES = (
    "Mary",
    "John",
    "Tom",
    "James",
    "Anna",
    "Paul",
    "Kate",
    "Mark",
    "Lucy",
    "Peter",
    "Jack",
    "Sarah",
    "David",
    "Emma",
)
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "brown", "pink")
THINGS = ("pen", "cup", "book", "hat", "bag", "ball", "box", "key", "ring", "phone")
PLACES = ("store", "park", "school", "garden", "station")
Pair = tuple[str, str, str, str]  # clean prompt, corrupt prompt, right answer, the corrupt prompt's


def indirect_object(draw: random.Random) -> Pair:
    one, two = draw.sample(NAMES, 2)
    place, thing = draw.choice(PLACES), draw.choice(THINGS)

    def text(giver: str) -> str:
        return f"When {one} and {two} went to the {place}, {giver} gave a {thing} to"

    return text(two), text(one), one, two


def coloured_objects(draw: random.Random) -> Pair:
    things, colours = draw.sample(THINGS, 3), draw.sample(COLOURS, 3)
    listed = ", ".join(f"the {t} is {c}" for c, t in zip(colours, things, strict=True)).capitalize()
    one, two = draw.sample(range(3), 2)

    def text(which: int) -> str:
        shown = "The car is gray, the shirt is silver, the door is gold. The shirt is silver."
        return f"{shown} {listed}. The {things[which]} is"

    return text(one), text(two), colours[one], colours[two]


def effects(task: str, draw: random.Random) -> HeadEffects:
    """First-order effects of all heads on the right answer's logit less the other's."""
    model, tokenizer, _ = default()
    make = indirect_object if task == "names" else coloured_objects
    pairs = [make(draw) for _ in range(PROMPTS)]
    clean, corrupt, right, other = zip(*pairs, strict=True)
    answers = [torch.tensor([tokenizer(" " + word).input_ids[0] for word in words]) for words in (right, other)]

    def lead(logits: Tensor) -> Tensor:
        first, second = (logits[:, -1].gather(1, each[:, None])[:, 0] for each in answers)
        return first - second

    ids = [tokenizer(list(texts), return_tensors="pt").input_ids for texts in (clean, corrupt)]
    return patching(model, ids[0], ids[1], lead, estimate=True)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = random.Random(seed)
    names, again, colours = (effects(task, draw) for task in ("names", "names", "colours"))
    numbers = {
        "overlap of the two tasks": names.overlap(colours, TOP),
        "overlap of other prompts of one task": names.overlap(again, TOP),
        "overlap by chance": TOP / names.share.numel(),
        "lead, names": names.clean,
        "lead, colours": colours.clean,
    }
    return numbers["overlap of the two tasks"] - numbers["overlap by chance"], numbers


CLAIM = Claim(
    key="P055",
    method="Patch",
    says="A circuit is reused: most heads of the circuit for indirect objects are in that for coloured objects.",
    paper_number="about 78% of in-circuit heads overlap (GPT-2 medium)",
    setup="SmolLM2-135M, 12 prompts a task and seed; the corrupt prompt has the other name as the giver, or asks for "
    "another thing's colour; the 20 of 270 heads with the largest effect on the lead of the right answer, by the first "
    "order estimate of activation patching, where the paper patches paths stage by stage. (A first wording of the "
    "second task gave the right colour no lead at all, and was replaced by the one of five with the largest lead.)",
    effect="share of the top heads that both tasks have, less chance",
    measure=measure,
    strong=0.3,
)


if __name__ == "__main__":
    run(CLAIM)
