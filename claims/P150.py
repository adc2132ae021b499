"""VisualHeads: are heads that look hard at some of a passage those by which a model answers from it?"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims._marked import ASKS, LINES, NAMES, WORDS
from claims.ledger import Claim, run
from heedful import attach
from heedful.core.figures import Head
from heedful.core.method import Stack
from heedful.methods.explain.patch import Patch
from heedful.methods.observe.visual_heads import Looks, VisualHeads

LOOKED, ASKED = 5, 10  # prompts that heads are found in, and others that they are silenced in
SILENCED = 12  # of 270 heads
METHOD = VisualHeads("context")


@dataclass(frozen=True, eq=False)
class _Asked:
    tokens: Tensor  # [1 n]
    passage: tuple[int, int]
    right: int  # the first token of the code that is asked for


def _prompts(draw: random.Random, count: int) -> list[_Asked]:
    tokenizer = default().tokenizer
    out = []
    for number in range(count):
        names, codes = (draw.sample(every.split(","), LINES) for every in (NAMES, WORDS))
        lines = [f"The code of the {name} is {code}.\n" for name, code in zip(names, codes, strict=True)]
        passage = tokenizer("".join(lines)).input_ids
        asked = draw.randrange(LINES)
        question = tokenizer(ASKS[number % len(ASKS)].format(names[asked])).input_ids
        right = tokenizer(f" {codes[asked]}").input_ids[0]
        # the first token, on which many heads park, is no part of the passage
        out.append(_Asked(torch.tensor([passage + question]), (1, len(passage)), right))
    return out


@torch.no_grad()
def _looks(prompts: list[_Asked]) -> Looks:
    with attach(default().model, METHOD) as seen:
        for item in prompts:
            seen.roles = {"context": (item.passage,)}
            seen(input_ids=item.tokens)
        found: Looks = seen[METHOD]
    return found


@torch.no_grad()
def _answers(prompts: list[_Asked], silent: list[Head]) -> float:
    """The mean log-probability of the code that is asked for, some heads silenced."""
    by_layer: defaultdict[int, list[int]] = defaultdict(list)
    for layer, head in silent:
        by_layer[layer].append(head)
    stack = Stack(tuple(Patch().on(layer, heads) for layer, heads in sorted(by_layer.items())))
    found = []
    with attach(default().model, stack) as session:
        for item in prompts:
            logits = session(input_ids=item.tokens, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            found.append(float(logits[item.right]))
    return sum(found) / len(found)


def _beside(draw: random.Random, heads: list[Head], every: list[Head]) -> list[Head]:
    """As many other heads of the same layers."""
    out: list[Head] = []
    for layer, _ in heads:
        left = [head for head in every if head not in heads and head not in out]
        out.append(draw.choice([head for head in left if head[0] == layer] or left))
    return out


def _ranked(values: Tensor, layers: tuple[int, ...]) -> list[Head]:
    heads = values.shape[1]
    return [(layers[i // heads], i % heads) for i in values.flatten().argsort(descending=True).tolist()]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = random.Random(seed)
    looks, prompts = _looks(_prompts(draw, LOOKED)), _prompts(draw, ASKED)
    every = list(looks.ranked)
    best = every[:SILENCED]
    ways: dict[str, list[Head]] = {
        "nothing": [],
        "highest scores": best,
        "others of their layers": _beside(draw, best, every),
        "most weight": _ranked(looks.weight, looks.layers)[:SILENCED],
    }
    found = {f"log-probability, {name} silenced": _answers(prompts, heads) for name, heads in ways.items()}
    again = _looks(prompts)
    ranks = torch.stack([x.score.flatten().argsort().argsort().double() for x in (looks, again)])
    numbers: dict[str, Any] = {"rank correlation of scores on other prompts": float(torch.corrcoef(ranks)[0, 1])}
    numbers["mean layer of the highest scores"] = sum(layer for layer, _ in best) / SILENCED
    apart = (
        found["log-probability, others of their layers silenced"] - found["log-probability, highest scores silenced"]
    )
    return apart, found | numbers


CLAIM = Claim(
    key="P150",
    method="VisualHeads",
    says="A distinct class of heads looks hard at visual tokens, told by weight and concentration, and what a model "
    "says of an image depends on it.",
    paper_number="none in the abstract: seen in four families of models and at four scales",
    setup=f"SmolLM2-135M-Instruct, which has no images: a passage of {LINES} lines that give things codes stands for "
    f"one. The {SILENCED} heads of 270 with the highest scores on {LOOKED} prompts are silenced in {ASKED} others, "
    "against as many others of the same layers. Details: heads chosen by weight or by concentration alone.",
    effect="log-probability of the right code that is lost above what other heads of the same layers lose",
    measure=measure,
    strong=0.5,
)

if __name__ == "__main__":
    run(CLAIM)
