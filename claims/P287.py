"""VASparse: does a cache keep more of a marked passage when entries are spared that look at it, before any question?"""

from __future__ import annotations

import torch

from claims._loaded import default
from claims._marked import LINES, Marked, prompts
from claims.ledger import Claim, run
from heedful import attach
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.methods import VASparse

PROMPTS, PASSAGE, BUDGET = 8, 2, 0.5
METHOD, BLIND = (VASparse(BUDGET, weight, "marked") for weight in (1.0, 0.0))
Spans = tuple[tuple[int, int], ...]


def aside(spans: Spans) -> Spans:
    """As many tokens before the passage or after it."""
    ((start, stop),) = spans
    by = stop - start if start == 0 else start - stop
    return ((max(0, start + by), stop + by),)


@torch.no_grad()
def told(item: Marked, method: VASparse, spans: Spans, found: dict[str, float], name: str) -> None:
    """What is said after the question, where the cache was cut before it."""
    loaded, ((start, stop),) = default(), item.spans
    lines = (item.tokens[0] == loaded.tokenizer("\n").input_ids[-1]).nonzero().flatten()
    cut = int(lines[LINES - 1]) + 1
    with attach(loaded.model, method.when("prefill"), roles={"marked": spans}) as run:
        cache = cache_of(run(input_ids=item.tokens[:, :cut], logits_to_keep=1))
        held = torch.stack([layer.index[0, 0] for layer in cache.layers])
        logits = run(input_ids=item.tokens[:, cut:], logits_to_keep=1, **{CACHE: cache}).logits[0, -1].double()
    numbers = {
        "log-probability": float(logits.log_softmax(-1)[item.right]),
        "beats the other": float(logits[item.right] > logits[item.wrong]),
        "passage kept": float(((held >= start) & (held < stop)).double().sum(-1).mean()) / (stop - start),
    }
    for what, number in numbers.items():
        found[f"{what}, {name}"] = found.get(f"{what}, {name}", 0.0) + number / PROMPTS


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found: dict[str, float] = {}
    for item in prompts(seed, PROMPTS, PASSAGE):
        told(item, METHOD, item.spans, found, "VASparse")
        told(item, METHOD, aside(item.spans), found, "another place")
        told(item, BLIND, item.spans, found, "without saliency")
    best = max(found["log-probability, another place"], found["log-probability, without saliency"])
    return found["log-probability, VASparse"] - best, found


CLAIM = Claim(
    key="P287",
    method="VASparse",
    says="A cache that spares what looks at an image keeps more of what it shows than one that does not.",
    paper_number="none given in the abstract: state of the art on four benchmarks of hallucination",
    setup=f"SmolLM2-135M, {PROMPTS} prompts a seed: {LINES} lines that give things codes, two of them unlike ones to "
    f"one thing; {PASSAGE} lines, one of the two among them, stand for the image. The cache is cut to "
    f"{BUDGET:.0%} before the question is read, once; the image, as in a model that sees, is a run of tokens that the "
    "selection knows of. Against no saliency, and saliency of as many tokens beside the passage, whichever is better. "
    "Not measured: the contrast and the penalty on sinks.",
    effect="log-probability of the code that the image tells, over no saliency or another place's",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
