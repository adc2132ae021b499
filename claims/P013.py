"""LargePiG: does the attention of the last layer point at the words of a source that should be copied?"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import Prompt
from heedful.core.kinds.decode import NOTHING_READ, Read
from heedful.methods.intervene.language.largepig import LAST, LargePiG
from heedful.text_models import text_model

ITEMS, TOWNS, LAYERS = 2, 5, (14, 18, 22, 26)  # every fourth layer of the upper half
PARTS = "vel mor tar quin os si dra len kub rith zan pel gor ta mi shu bran eth ul vok yar nis"


class _Listening(LargePiG):
    """The same, and what it was told last is kept for the controls."""

    told: ClassVar[list[tuple[Mapping[str, Tensor], Read]]] = []

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        self.told[:] = [(logits, read)]
        return super().combine(logits, read)


def even(read: Read) -> Read:
    """A pointer that looks at every token of the source alike."""
    return {LAST: {part: (tokens, torch.full_like(given, 1 / len(given)))
                   for part, (tokens, given) in read[LAST].items()}}  # fmt: skip


def item(chance: random.Random) -> tuple[Prompt, list[int]]:
    """Who rules which town, in names that nobody has heard, and the name that is asked for."""
    tokenizer = default().tokenizer

    def name() -> str:
        return "".join(chance.sample(PARTS.split(), 3)).capitalize()

    rulers = {name(): f"{name()} {name()}" for _ in range(TOWNS)}
    source = tokenizer(" ".join(f"The mayor of {town} is {ruler}." for town, ruler in rulers.items())).input_ids
    town = chance.choice(sorted(rulers))
    ids = source + tokenizer(f"\nQuestion: who is the mayor of {town}?\nAnswer: the mayor of {town} is").input_ids
    prompt = Prompt(tuple(ids), {"context": ((0, len(source)),)})
    return prompt, tokenizer(f" {rulers[town]}").input_ids


@torch.no_grad()
def surprise(prompt: Prompt, answer: list[int]) -> dict[str, float]:
    """Nats a token of the answer, by each way of saying it."""
    method = _Listening(layers=LAYERS)
    found = dict.fromkeys(("the model", "pointer", "even pointer"), 0.0) | {"p": 0.0}
    with text_model(default().model, method) as voice:
        pointed = voice.read(prompt)[0]
        for i, token in enumerate(answer):
            ((logits, read),) = method.told
            ways = {
                "the model": logits[LAST],
                "pointer": pointed,
                "even pointer": LargePiG(layers=LAYERS).combine(logits, even(read)),
            }
            for name, x in ways.items():
                found[name] -= float(x.log_softmax(-1)[token]) / len(answer)
            found["p"] += float(method.copying(logits)) / len(answer)
            if i + 1 < len(answer):
                pointed = voice.go_on(token)
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    chance = random.Random(seed)
    each = [surprise(*item(chance)) for _ in range(ITEMS)]
    numbers = {f"nats a token, {name}": sum(x[name] for x in each) / ITEMS for name in each[0] if name != "p"}
    numbers["what the pointer weighs"] = sum(x["p"] for x in each) / ITEMS
    best = min(numbers["nats a token, the model"], numbers["nats a token, even pointer"])
    return best - numbers["nats a token, pointer"], numbers


CLAIM = Claim(
    key="P013",
    method="LargePiG",
    says="A language model's own attention points at what should be copied from a source, so that mixing it into the "
    "next-token distribution keeps to the source.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct, {ITEMS} prompts a seed: {TOWNS} sentences about the mayors of towns, all names "
    "invented, and a question after one; the surprise of the mayor's name, against the model alone and against a "
    "pointer of the same weight that looks at all tokens of the source alike, whichever is better.",
    effect="nats a token of the name that the pointer saves over the better of the two",
    measure=measure,
    seeds=8,
)


if __name__ == "__main__":
    run(CLAIM)
