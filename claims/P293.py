"""S3Attention: do features that keys and queries share find the evidence that words do not?"""

from __future__ import annotations

import random
import statistics
from functools import cache

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import Prompt, fit
from heedful.api import reader
from heedful.core.kinds.tokens import Reader
from heedful.core.regions import Span
from heedful.methods.sparse.tokens.s3_attention import S3Attention, _Projections

FACTS, ITEMS, BUDGET, LAYERS = 12, 24, 0.25, (9, 14)
TEXTS, WORDS = 8, 200  # that the autoencoders are fitted to, a seed
NAMES = "Anna Boris Clara David Elena Frank Grace Henry Irene James Karen Louis Maria Peter Sarah Thomas"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
THINGS = {
    "violin": "a musical instrument", "hammer": "a tool", "tulip": "a flower", "salmon": "some fish",
    "lemon": "some fruit", "sofa": "furniture", "jacket": "something to wear", "truck": "a vehicle",
    "rifle": "a weapon", "poodle": "a dog", "wine": "something to drink", "diamond": "a jewel",
    "carrot": "a vegetable", "parrot": "a bird", "novel": "something to read", "castle": "a building",
}  # fmt: skip


class Plain(S3Attention):
    """The keys themselves: the cosine of a span's best token with one of the question's queries, without features."""

    def scores(self, prompt: Prompt, spans: tuple[Span, ...], question: Span, read: Reader) -> Tensor:
        asked, told = (read(prompt.piece(*x), _Projections(self.layers)) for x in (question, (0, question[0])))
        found = []
        for layer, x in told.items():
            key, query = (y - c for y, c in zip((x[0], asked[layer][1]), self.sae[f"center.{layer}"], strict=True))  # type: ignore[index]
            found.append(torch.cosine_similarity(key, query[:, None], dim=-1))
        best = torch.stack(found).sum(0).amax(0)
        return torch.stack([best[a:b].max() for a, b in spans])


class AnySpans(S3Attention):
    """The control: spans by chance."""

    def scores(self, prompt: Prompt, spans: tuple[Span, ...], question: Span, read: Reader) -> Tensor:
        return torch.rand(len(spans), generator=torch.Generator().manual_seed(hash(prompt.tokens) % 2**32))


def item(draw: random.Random, by_name: bool) -> tuple[Prompt, int]:
    """Who bought what, a question on one of them, and which: asked by the name, or by the kind of thing, whose word
    stands nowhere else."""
    tokenizer = default().tokenizer
    names, things = draw.sample(NAMES.split(), FACTS), draw.sample(sorted(THINGS), FACTS)
    tokens: list[int] = tokenizer("Some facts.\n").input_ids
    spans = []
    for name, thing in zip(names, things, strict=True):
        piece = tokenizer(f"Last {draw.choice(DAYS.split())} {name} bought a {thing}.\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    place = draw.randrange(FACTS)
    asked = f"What did {names[place]} get?" if by_name else f"Who got {THINGS[things[place]]}?"
    return Prompt((*tokens, *tokenizer(f"Question: {asked}\nAnswer:").input_ids), {"documents": tuple(spans)}), place


def kept(prompt: Prompt, place: int, method: S3Attention, read: Reader) -> float:
    start, stop = prompt.roles["documents"][place]
    left = method.arrange(prompt, read)
    return float(prompt.tokens[start:stop] in [left.tokens[a:b] for a, b in left.roles["documents"]])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    texts = [tokenizer(text, return_tensors="pt") for text in apart(seed, TEXTS, WORDS, fitting=True)]
    fitted = fit(S3Attention(BUDGET, layers=LAYERS, tokens=128, epochs=12, seed=seed), model, texts)
    how = {"layers": LAYERS, "sae": fitted.sae}
    ways = {
        "features": fitted,
        "features and BM25": S3Attention(BUDGET, lexical=0.5, **how),
        "BM25": S3Attention(BUDGET, lexical=1.0),
        "cosine": Plain(BUDGET, **how),
        "cosine and BM25": Plain(BUDGET, lexical=0.5, **how),
        "chance": AnySpans(BUDGET),
    }
    draw, rows, read = random.Random(seed), [], cache(reader(model))  # ways share what they read
    for number in range(ITEMS):
        prompt, place = item(draw, number % 2 == 0)
        rows.append({name: kept(prompt, place, method, read) for name, method in ways.items()})
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in ways}
    for kind, mine in (("by name", rows[::2]), ("by kind", rows[1::2])):
        numbers |= {f"{name}, asked {kind}": statistics.fmean(row[name] for row in mine) for name in ways}
    return numbers["features and BM25"] - max(numbers["BM25"], numbers["chance"]), numbers


CLAIM = Claim(
    key="P293",
    method="S3Attention",
    says="Features that fire at keys and at a question's queries, fused with BM25, retrieve the evidence that a long "
    "text is needed for.",
    paper_number="S3-Hybrid closely matches full-context inference on LongBench (abstract; no number)",
    setup=f"SmolLM2-135M, {ITEMS} prompts a seed of {FACTS} sentences on who bought what, half of them asked by the "
    "name, half by the kind of thing, no word of which stands in the text; a quarter of the sentences' tokens stay: "
    "how often the wanted one is among them, by features fused with BM25, against the better of BM25 alone and chance; "
    f"keys without features are in the details. Autoencoders of layers {' and '.join(map(str, LAYERS))} of 30, fitted "
    f"a seed to {TEXTS} pieces of {WORDS} words of prose. Layers, number of features, steps, that autoencoders are of "
    "keys alone, that a span scores by its best token, and that shared features are counted rather than weighed were "
    "chosen on 16 prompts of another draw.",
    effect="share of prompts in which the wanted sentence stays, more than by the best control",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
