"""MaxActivations: do layers with larger maxima lose more when their residual stream is rounded to 8 bits?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import passages
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods.observe.max_activations import MaxActivations

TOKENS = 256


def chunk_invariant(model: Any, ids: Tensor) -> list[Tensor]:
    """The residual stream after each layer, `[n e]`."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def lost(x: Tensor) -> float:
    """What the middle token loses under one absmax scale for all: its error over its norm."""
    scale = x.abs().max() / 127
    error = (x - (x / scale).round() * scale).norm(dim=-1) / x.norm(dim=-1)
    return float(error.median())


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = torch.stack([torch.tensor(x).argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    ids = torch.tensor([tokenizer(passages(seed, 1, TOKENS)[0]).input_ids[:TOKENS]])
    with torch.no_grad():
        with attach(model, MaxActivations()) as attached:
            attached(input_ids=ids)
            found = attached[MaxActivations()]
        errors = [lost(x) for x in chunk_invariant(model, ids)]
    peaks = list(found.layers.values())
    numbers = {
        "global maximum": peaks[found.top].value,
        "its layer": float(found.top),
        "its channel": float(peaks[found.top].channel),
        "its token": float(peaks[found.top].place[peaks[found.top].channel]),
        "layers with massive activations": float(len(found.massive_layers)),
        "error of the middle token in that layer": errors[found.top],
        "least error of all layers": min(errors),
        "rank correlation of mean magnitude and error": rank_correlation([p.mean for p in peaks], errors),
    }
    return rank_correlation([p.value for p in peaks], errors), numbers


CLAIM = Claim(
    key="P309",
    method="MaxActivations",
    says="Maximum activations are a property of the model, mostly of the residual stream, and co-vary with the error "
    "of 8-bit rounding through the scale that they force.",
    paper_number="no correlation in the abstract; the residual stream holds the maximum in 22 of 24 models",
    setup="SmolLM2-135M-Instruct, one of Python's help texts a seed cut to 256 tokens; each layer's residual stream "
    "rounded with one absmax scale, error of the median token. One model only: nothing is said of families.",
    effect="rank correlation over layers, maximum against 8-bit error",
    measure=measure,
    strong=0.5,
)


if __name__ == "__main__":
    run(CLAIM)
