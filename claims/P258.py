"""DuoAttention: do learned gates tell which heads need the whole cache better than chance does?"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from claims._cache import default, losses, recall
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods.sparse.cache.duo_attention import IGNORED, DuoAttention

SHARE, SINKS, WINDOW, TEXTS = 0.5, 4, 32, 8


def lesson(seed: int) -> dict[str, Tensor]:
    """A short recall prompt as a fit wants it: the digits asked for count."""
    text = recall(seed, words=120, facts=4)
    ids = torch.cat([text.context, text.rest], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, text.context.shape[1] :][text.counts] = text.rest[text.counts]
    return {"input_ids": ids, "labels": labels}


@cache
def fitted() -> DuoAttention:
    method = DuoAttention(SHARE, SINKS, WINDOW, epochs=2, rate=0.1)
    found: DuoAttention = fit(method, default().model, [lesson(1000 + i) for i in range(TEXTS)])
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text = recall(seed)
    gates = torch.stack(list((fitted().gates or {}).values()))
    numbers = {"gates below 0.5": float((gates < 0.5).double().mean())}
    for how, method in (
        ("everything", None),
        ("learned gates", fitted()),
        ("random gates", DuoAttention(SHARE, SINKS, WINDOW, seed=seed)),
        ("no retrieval head", DuoAttention(0.0, SINKS, WINDOW, seed=seed)),
    ):
        numbers[f"loss on numbers, {how}"] = losses(text, method)
    return numbers["loss on numbers, random gates"] - numbers["loss on numbers, learned gates"], numbers


CLAIM = Claim(
    key="P258",
    method="DuoAttention",
    says="Gates learned on synthetic passkeys find the heads that need the whole cache; the others do with a window.",
    paper_number="memory 2.55x (MHA) and 1.67x (GQA) smaller with minimal accuracy loss (abstract)",
    setup=f"SmolLM2-135M, towns' numbers strewn over about 400 tokens and asked for after them; half of the key heads "
    f"stream with {SINKS} sinks and a window of {WINDOW}. Gates learned once, 2 passes over {TEXTS} such prompts of "
    "about 270 tokens at a rate of 0.1; against random gates at equal memory, drawn anew for each text.",
    effect="nats of loss per digit that learned gates save",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
