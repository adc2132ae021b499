"""BlindSight: do heads' kinds, found from other prompts, tell which heads may be kept from other documents?"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from claims._cache import LESSONS, TOWNS, Source
from claims._loaded import default
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import Method, attach, fit
from heedful.core.fitted import Fitted
from heedful.methods import BlindSight

DOCUMENTS, WORDS, QUESTIONS, LEARNT, KEEP, DRAWS = 6, 40, 4, 2, 0.9, 2
KINDS = ("sinks", "document", "document and sinks", "everything")
Spans = tuple[tuple[int, int], ...]


class Asked(NamedTuple):
    """Documents and questions behind them as one text, the documents' spans, and which tokens are digits of answers."""

    tokens: Tensor  # [1 n]
    spans: Spans
    counts: Tensor  # [n]


def prompts(seed: int, source: Source, count: int = 1) -> list[Asked]:
    """Texts of documents, each with a town's number within prose, and of questions with their answers."""
    draw, tokenizer, found = random.Random(seed), default().tokenizer, []

    def ids(text: str) -> Tensor:
        made: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        return made

    every = source(seed, DOCUMENTS * count, WORDS)
    for prose in zip(*[iter(every)] * DOCUMENTS, strict=True):
        numbers = {town: f"{draw.randrange(10**4):04d}" for town in draw.sample(TOWNS, DOCUMENTS)}
        parts = [ids("Documents:\n\n")]
        for text, (town, number) in zip(prose, numbers.items(), strict=True):
            words = text.split()
            before, after = (" ".join(half) for half in (words[: WORDS // 2], words[WORDS // 2 :]))
            parts.append(ids(f"{before} The number of {town} is {number}. {after}\n\n"))
        spans = tuple(pairwise(torch.tensor([len(x) for x in parts]).cumsum(0).tolist()))
        counts = [torch.zeros(len(x), dtype=torch.bool) for x in parts]
        for town in draw.sample(sorted(numbers), QUESTIONS):
            for text, answers in ((f"The number of {town} is ", False), (numbers[town], True), (".\n", False)):
                parts.append(ids(text))
                counts.append(torch.full((len(parts[-1]),), answers))
        found.append(Asked(torch.cat(parts)[None], spans, torch.cat(counts)))
    return found


@torch.no_grad()
def loss(model: Any, asked: Asked) -> float:
    """Nats a digit of the answers."""
    logits = model(input_ids=asked.tokens, use_cache=False).logits[0, :-1]
    lost = torch.nn.functional.cross_entropy(logits, asked.tokens[0, 1:], reduction="none")
    return float(lost[asked.counts[1:]].mean())


def pairs(kinds: list[int], spans: Spans) -> float:
    """The share of the pairs between documents' tokens that are computed."""
    sizes = [stop - start for start, stop in spans]
    whole = sum(size * (size + 1) / 2 for size in sizes)
    behind = sum(sum(sizes[:i]) * size for i, size in enumerate(sizes))
    first = sum(i * size for i, size in enumerate(sizes))  # pairs with first tokens of documents before
    each = (first + sum(sizes), whole, whole + first, whole + behind)
    return statistics.fmean(each[kind] for kind in kinds) / each[-1]


def kinds_of(kept: Fitted) -> list[int]:
    """The kind of every head of the model."""
    shares = torch.cat([kept[f"kept.{layer}"] for layer in range(len(kept))])
    return torch.cat([shares >= KEEP, torch.ones(len(shares), 1)], 1).argmax(1).tolist()


def shuffled(kept: Fitted, seed: int) -> Fitted:
    """The same kinds, given to other heads."""
    shares = torch.cat([kept[f"kept.{layer}"] for layer in range(len(kept))])
    mixed = shares[torch.randperm(len(shares), generator=torch.Generator().manual_seed(seed))]
    return Fitted({f"kept.{layer}": x.clone() for layer, x in enumerate(mixed.chunk(len(kept)))})


def alike(kept: Fitted, kind: int) -> Fitted:
    """One kind for all heads."""
    one = torch.zeros_like(kept["kept.0"])
    one[:, kind] = 1.0
    return Fitted({name: one.clone() for name in kept})


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model = default().model
    lessons = [
        {"input_ids": each.tokens, "roles": {"documents": each.spans}} for each in prompts(seed, LESSONS, LEARNT)
    ]
    method = fit(BlindSight(keep=KEEP), model, lessons)
    kept = method.kept or Fitted({})
    (asked,) = prompts(seed, apart)
    kinds = kinds_of(kept)
    ways: dict[str, Method] = {"as found": method}
    ways["all their own document"] = replace(method, kept=alike(kept, 1))
    ways |= {f"shuffled {i}": replace(method, kept=shuffled(kept, DRAWS * seed + i)) for i in range(DRAWS)}
    numbers = {f"heads that see {name}": kinds.count(kind) / len(kinds) for kind, name in enumerate(KINDS)}
    numbers["pairs between documents' tokens"] = pairs(kinds, asked.spans)
    numbers["loss, everything"] = loss(model, asked)
    for name, way in ways.items():
        with attach(model, way, roles={"documents": asked.spans}, backend="tiled") as attached:
            numbers[f"loss, {name}"] = loss(attached, asked)
    numbers["loss, shuffled"] = statistics.fmean(numbers.pop(f"loss, shuffled {i}") for i in range(DRAWS))
    return numbers["loss, shuffled"] - numbers["loss, as found"], numbers


CLAIM = Claim(
    key="P208",
    method="BlindSight",
    says="Each head's kind (sinks, own image, both, everything), found once from a few samples, may be taken for other "
    "prompts, and saves much at little loss.",
    paper_number="32 to 41 % fewer FLOPs at -2 to +2 % accuracy on most tests of several images (first abstract); "
    "0.78 % lost on average (second)",
    setup=f"SmolLM2-135M and text for images: {DOCUMENTS} documents of {WORDS} words of prose with a town's number "
    f"within, and {QUESTIONS} questions with their answers behind them. Kinds found for each seed from {LEARNT} such "
    f"prompts of other topics, a mask having to keep {KEEP:.0%} of the weight; against the same kinds given to other "
    f"heads, mean of {DRAWS} draws. The details have their own document for all heads, the pairs left, and no mask.",
    effect="nats of loss a digit that the kinds' places save",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
