"""AvisC: does a contrast with the tokens that a model stares at make it say what the others tell?"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import torch

from claims._loaded import default
from claims._marked import ASKS, LINES, NAMES, WORDS
from claims.ledger import Claim, run
from heedful import Prompt
from heedful.api import reader
from heedful.methods import AvisC
from heedful.text_models import Combined

PROMPTS = 12


def item(draw: random.Random) -> tuple[Prompt, list[int], int]:
    """Lines that give each thing a code, a question about one, the first tokens of all codes, and which is right."""
    tokenizer = default().tokenizer
    names, words = draw.sample(NAMES.split(","), LINES), draw.sample(WORDS.split(","), LINES)
    text = "".join(f"The code of the {name} is {word}.\n" for name, word in zip(names, words, strict=True))
    lines, asked = tokenizer(text).input_ids, draw.randrange(LINES)
    ids = lines + tokenizer(draw.choice(ASKS).format(names[asked])).input_ids
    prompt = Prompt(tuple(ids), {"image": ((1, len(lines)),)})
    return prompt, [tokenizer(f" {word}").input_ids[0] for word in words], asked


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, draw = default().model, random.Random(seed)
    found: defaultdict[str, float] = defaultdict(float)
    for _ in range(PROMPTS):
        prompt, codes, right = item(draw)
        method = AvisC(beta=0.0)
        told = method.ready(prompt, reader(model))
        if not isinstance(told, AvisC) or not told.emptied:
            raise ValueError("every token of the image is blind, so that there is nothing to contrast with")
        ((start, stop),) = prompt.spans("image")
        some = tuple(sorted(draw.sample(range(start, stop), len(told.emptied))))
        ways = {"plain": AvisC.neutral(), "AvisC": told, "as many drawn": replace(told, emptied=some)}
        for name, way in ways.items():
            with Combined(model, way) as voice:
                logits = voice.read(prompt)[0]
            found[f"log-probability, {name}"] += float(logits[codes].log_softmax(-1)[right]) / PROMPTS
            found[f"right, {name}"] += float(int(logits.argmax()) == codes[right]) / PROMPTS
        found["share left in the contrast"] += (1 - len(told.emptied) / (stop - start)) / PROMPTS
    best = max(found["log-probability, plain"], found["log-probability, as many drawn"])
    return found["log-probability, AvisC"] - best, dict(found)


CLAIM = Claim(
    key="P158",
    method="AvisC",
    says="A contrast with what a model says from the tokens alone at which it stares makes it heed the others.",
    paper_number="none given in the abstract: better than other ways of decoding on POPE, MME and AMBER",
    setup=f"SmolLM2-135M, {PROMPTS} prompts a seed: {LINES} lines, all but their first token, stand for the image and "
    "give each thing a code; the code of one is asked for. The paper's settings, without its cut-off, which would make "
    "some log-probabilities infinite. Against no contrast, and against one in which as many other tokens are left, "
    "drawn at random, whichever is better. P158_sight tries it on pictures.",
    effect="log-probability of the right code among the eight, over no contrast or a random one",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
