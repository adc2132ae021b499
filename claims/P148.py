"""Sentinel: does a linear probe of all heads know the sentence that a question needs better than their mean does?"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from claims._loaded import default
from claims.ledger import Claim, run
from claims.P125 import NAMES, TOWNS
from heedful import Prompt, attach, fit
from heedful.methods.sparse.tokens.sentinel import Sentinel, _EachHead, features

SENTENCES, FITTED, TRIED = 8, 10, 10  # in a text; texts a seed
KNOWN = (
    ("{0} was born in {1} and liked it there.", "Where was {0} born?"),
    ("The train to {1} was late when {0} took it.", "Which train did {0} take?"),
)
UNKNOWN = ("For the summer {0} found work at a harbour near {1}.", "In which place did {0} work?")


def item(draw: random.Random, template: tuple[str, str]) -> tuple[Prompt, list[int]]:
    """Sentences of one shape before a question, and which of them is wanted."""
    tokenizer = default().tokenizer
    names, towns = draw.sample(NAMES.split(), SENTENCES), draw.sample(TOWNS.split(), SENTENCES)
    tokens: list[int] = tokenizer("Some facts.\n").input_ids
    spans = []
    for name, town in zip(names, towns, strict=True):
        piece = tokenizer(template[0].format(name, town) + "\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    place = draw.randrange(SENTENCES)
    tokens += tokenizer(f"Question: {template[1].format(names[place])}\nAnswer:").input_ids
    return Prompt(tuple(tokens), {"documents": tuple(spans)}), [int(i == place) for i in range(SENTENCES)]


@torch.no_grad()
def read(prompt: Prompt) -> Tensor:
    with attach(default().model, reader := _EachHead(len(prompt))) as opened:
        opened(input_ids=torch.tensor([prompt.tokens]), use_cache=False)
    return features(opened[reader], prompt.spans("documents"))


def above(scores: Tensor, wanted: Tensor) -> float:
    """How often a wanted sentence is above one that is not: the area under the curve."""
    apart = scores[wanted][:, None] - scores[~wanted]
    return float(((apart > 0) + 0.5 * (apart == 0)).mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = random.Random(seed)
    batches = [
        {"input_ids": torch.tensor([prompt.tokens]), "roles": prompt.roles, "label": label}
        for prompt, label in (item(draw, KNOWN[i % len(KNOWN)]) for i in range(FITTED))
    ]
    probe: Sentinel = fit(Sentinel(), default().model, batches)
    tried = [item(draw, UNKNOWN) for _ in range(TRIED)]
    x = torch.cat([read(prompt) for prompt, _ in tried])
    wanted = torch.tensor([label for _, label in tried]).flatten().bool()
    numbers = {"area, probe": above(probe.scores(x), wanted), "area, mean of heads": above(x.mean(1), wanted)}
    return numbers["area, probe"] - numbers["area, mean of heads"], numbers


CLAIM = Claim(
    key="P148",
    method="Sentinel",
    says="A linear probe of the attention of a small model's last token tells which sentences a question needs.",
    paper_number="up to 5 times shorter contexts on LongBench, as good as compressors of 7B (abstract)",
    setup=f"SmolLM2-135M; a probe fitted a seed to {FITTED} texts of {SENTENCES} sentences of two shapes, tried on "
    f"{TRIED} texts of a third shape: how often the wanted sentence is above one that is not, by the probe and by the "
    "mean of the same features over all heads. The first run, not changed after it was seen.",
    effect="area under the curve, probe minus mean of heads",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
