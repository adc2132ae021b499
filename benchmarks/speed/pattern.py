"""What an edit of the pattern costs a whole forward, over the plain one that keeps no pattern."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.sparse import text
from benchmarks.speed.timing import race, record
from heedful import attach, models
from heedful.core.method import Method
from heedful.methods.intervene.language.act import ACT
from heedful.methods.intervene.language.pasta import PASTA
from heedful.methods.intervene.language.temp_scale import TempScale

EDITS: dict[str, Method] = {"ACT": ACT(), "PASTA, 40 marked tokens": PASTA(), "TempScale, scores in tiles": TempScale()}
ROLES = {"marked": ((100, 140),)}


def measure(tokens: int = 2048, rounds: int = 5) -> None:
    """Each edit in every layer, the last logits alone computed, as in generation."""
    model, tokenizer, _ = models.default()
    feed = {"input_ids": text(tokenizer, tokens), "use_cache": False, "logits_to_keep": 1}

    def edited(method: Method) -> Any:
        with attach(model, method, roles=ROLES) as run:
            return run(**feed)

    def eager() -> Any:
        model.set_attn_implementation("eager")
        try:
            return model(**feed)
        finally:
            model.set_attn_implementation("sdpa")

    runs: dict[str, Any] = {"plain forward": lambda: model(**feed), "the model's own eager attention": eager}
    runs |= {name: (lambda m=method: edited(m)) for name, method in EDITS.items()}
    with torch.no_grad():
        found = race(runs, rounds)
    print({name: x["ratio"] for name, x in found.items()}, flush=True)
    record("pattern", [{"tokens": tokens, "found": found}], baseline="plain forward", model="SmolLM2-135M")
