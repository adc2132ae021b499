"""LLMInt8: is it the columns of outliers that 8-bit inputs fail on?"""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from claims._loaded import default
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import Site, attach, operate
from heedful.authoring import Call, at
from heedful.core.method import Method
from heedful.methods import Absmax, LLMInt8

TOKENS, TEXTS = 128, 8


class _Drawn(Method):
    """As many columns apart as have outliers, but others, drawn anew for each text, layer and place."""

    paper = LLMInt8.paper
    chunk_invariant = False
    causal = False
    seed: int = 0

    @at(Site.HIDDEN)
    def shown(self, x: Tensor, call: Call) -> Tensor:
        return self.rounded(x, 2 * call.layer)

    @at(Site.HEAD_OUTPUT)
    def handed_on(self, heads: Tensor, call: Call) -> Tensor:
        x = heads.transpose(1, 2)
        return self.rounded(x.flatten(2), 2 * call.layer + 1).view_as(x).transpose(1, 2)

    def rounded(self, x: Tensor, place: int) -> Tensor:
        count = int((x.abs() >= LLMInt8().threshold).any(1).sum())
        draw = torch.Generator().manual_seed(1009 * self.seed + place)
        stays = torch.zeros(x.shape[-1], dtype=torch.bool)
        stays[torch.randperm(x.shape[-1], generator=draw)[:count]] = True
        step = x.masked_fill(stays, 0.0).abs().amax(-1, keepdim=True) / 127
        return x.where(stays, (x / step.masked_fill(step == 0, 1.0)).round() * step)


@cache
def rounded() -> Any:
    return operate(default().model, Absmax())


def texts(seed: int) -> list[Tensor]:
    return [torch.tensor([default().tokenizer(x).input_ids[:TOKENS]]) for x in apart(seed, TEXTS, TOKENS)]


@torch.no_grad()
def loss(model: nn.Module, ids: list[Tensor], what: Method | None = None) -> float:
    """Mean loss, text by text, in nats a token."""
    if what is None:
        return statistics.fmean(model(input_ids=x, labels=x, use_cache=False).loss.item() for x in ids)
    with attach(model, what) as run:
        return statistics.fmean(run(input_ids=x, labels=x, use_cache=False).loss.item() for x in ids)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ids = texts(seed)
    numbers = {
        "loss": loss(default().model, ids),
        "loss, weights in 8 bits": loss(rounded(), ids),
        "loss, inputs too, none apart": loss(rounded(), ids, LLMInt8(1e9)),
        "loss, columns of outliers apart": loss(rounded(), ids, LLMInt8()),
        "loss, as many others apart": loss(rounded(), ids, _Drawn(seed)),
    }
    return numbers["loss, as many others apart"] - numbers["loss, columns of outliers apart"], numbers


CLAIM = Claim(
    key="P322",
    method="LLMInt8",
    says="With the columns of outliers multiplied apart, 8-bit multiplication costs nothing; without, it fails.",
    paper_number="no degradation up to 175B parameters, with more than 99.9 % of values multiplied in 8 bits",
    setup=f"SmolLM2-135M-Instruct, {TEXTS} texts of {TOKENS} tokens of Python's documentation a seed; weights and "
    "inputs of attention's projections in 8 bits, columns with a magnitude of 6 or more apart, against as many "
    "columns drawn at random. The paper finds outliers that matter from 6.7B parameters on.",
    effect="nats a token that other columns apart lose more",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
