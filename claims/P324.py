"""FP4: do the feed-forward part's up and down projections bear four-bit floats worse than attention's?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from claims import P322
from claims._loaded import default
from claims.ledger import Claim, run
from heedful.methods import FP4

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FORWARD = ("gate_proj", "up_proj", "down_proj")


@contextmanager
def rounded(what: FP4, names: tuple[str, ...], layers: range) -> Iterator[Any]:
    """The model with the named projections in four bits in these layers, for the length of a `with`."""
    model: Any = default().model
    maps = [
        module
        for number in layers
        for name, module in model.model.layers[number].named_modules()
        if name.rpartition(".")[2] in names and isinstance(module, nn.Linear)
    ]
    before = [m.weight.data for m in maps]
    for m in maps:
        m.weight.data = what.in_blocks(m.weight.data)
    try:
        yield model
    finally:
        for m, weight in zip(maps, before, strict=True):
            m.weight.data = weight


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    ids = P322.texts(seed)
    whole, depth = P322.loss(default().model, ids), len(default().model.model.layers)
    numbers = {"loss": whole}
    for name in (*ATTENTION, *FORWARD):
        with rounded(FP4("mxfp4"), (name,), range(depth)) as model:
            numbers[f"rise, {name}"] = P322.loss(model, ids) - whole
    for form in ("mxfp4", "nvfp4"):
        for word, part in (("first", range(depth // 3)), ("last", range(depth - depth // 3, depth))):
            with rounded(FP4(form), (*ATTENTION, *FORWARD), part) as model:
                numbers[f"rise, {form}, {word} third of layers"] = P322.loss(model, ids) - whole
    return effect(numbers), numbers


def effect(numbers: dict[str, float]) -> float:
    forward = min(numbers[f"rise, {name}"] for name in ("up_proj", "down_proj"))
    return forward - statistics.fmean(numbers[f"rise, {name}"] for name in ATTENTION)


CLAIM = Claim(
    key="P324",
    method="FP4",
    says="In FP4 the up and down projections of the feed-forward part are the most sensitive, attention's the least.",
    paper_number="none in the abstract; Qwen2.5 of 0.5B, 7B and 14B",
    setup=f"SmolLM2-135M-Instruct, {P322.TEXTS} texts of {P322.TOKENS} tokens of Python's documentation a seed; the "
    "weights of one projection in all layers in MXFP4, the lesser rise of up and down against the mean of q, k, v and "
    "o. Details: each projection, and all in the first and the last third of the layers, in both formats. Up and "
    "down hold 3 to 8 times as many weights as each of attention's. (First the mean of up and down was asked for, "
    "which down carries alone; the effect was changed after that, and follows from the same measurements.)",
    effect="nats a token by which the loss rises more for each of up and down than for attention's projections",
    measure=measure,
    seeds=5,
)

if __name__ == "__main__":
    run(CLAIM)
