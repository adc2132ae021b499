"""depth_use: are layers used the less, the deeper they lie in a stream whose variance grows?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims._texts import apart
from claims.ledger import Claim, run
from claims.P244 import correlation
from heedful.explaining import depth_use

TEXTS, WORDS, LENGTH = 1, 170, 128  # tokens are cut at LENGTH
SEEDS = 5


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, tokenizer, _ = default()
    batches: list[dict[str, Any]] = []
    for text in apart(seed, TEXTS, WORDS):
        ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH]
        batches.append({"input_ids": ids, "labels": ids, "use_cache": False})
    found = depth_use(model, batches)
    depth = torch.arange(len(found.losses), dtype=torch.double)
    inner = slice(1, -1)  # the first layer makes words of tokens, the last one words of states
    numbers = {
        "loss": found.loss,
        "useful layers": found.useful,
        "variance, last over first": float(found.variance[-1] / found.variance[0]),
        "correlation of depth and variance": correlation(depth, found.variance),
        "correlation of depth and turn": correlation(depth, found.turn),
        "correlation of turn and rise": correlation(found.turn, found.rise),
        "correlation of depth and rise, without first and last": correlation(depth[inner], found.rise[inner]),
    }
    half = len(depth) // 2
    numbers |= {"rise, first half": float(found.rise[:half].median()), "rise, last": float(found.rise[half:].median())}
    return -correlation(depth, found.rise), numbers


CLAIM = Claim(
    key="P288",
    method="depth_use",
    says="The stream's variance grows with depth, so that deep layers come near to the identity and are used less.",
    paper_number="of 32 layers, 14 not useful (project page)",
    setup=f"SmolLM2-135M (30 layers, normed before each), a piece a seed of {LENGTH} tokens of Python's "
    "documentation. Spearman's correlation over layers of depth with what the loss rises by without the layer. That "
    "sparsity helps, which the authors train for, is not measured; growth, angles, and the correlation without the "
    "first and the last layer are in the details.",
    effect="rank correlation of a layer's depth and how little the loss rises without it",
    measure=measure,
    seeds=SEEDS,
    strong=0.2,
)

if __name__ == "__main__":
    run(CLAIM)
