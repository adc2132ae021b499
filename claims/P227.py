"""CoarseToFineAttention: do few cells, looked at closely, do better than all of them from afar?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._digits import HELD_OUT, LAYERS, SIDE, Reads, digits, placed, taught
from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Method, Site, reads
from heedful.core.method import Part, Stack
from heedful.core.stats import Mean
from heedful.methods import CoarseToFineAttention
from heedful.methods.mechanisms.normalise._grouped import Groups

STEPS, CELL, SHOWN = 150, 2, 64


class _Coarse(CoarseToFineAttention):
    """The paper's control: a softmax over cells, and all that lies in one counts alike."""

    def across(self, means: Tensor, held: Tensor) -> Tensor:
        return means.masked_fill(~held, torch.finfo(means.dtype).min).softmax(-1)

    def within(self, scores: Tensor, seen: Tensor, groups: Groups, of_cell: Tensor) -> Tensor:
        return groups.softmax(torch.zeros_like(scores), seen, of_cell)


class _Looked(Method):
    """The share of keys that have any weight."""

    paper = Reads.paper

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        seen = torch.ones_like(weights, dtype=torch.bool) if call.keep is None else call.keep.expand_as(weights)
        return Mean.of((weights > 0).sum(), float(seen.sum()))


WAYS: dict[str, Part | Stack] = {
    "coarse to fine": CoarseToFineAttention(CELL),
    "coarse alone": _Coarse(CELL),
    "softmax": Stack(),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {}
    for name, what in WAYS.items():
        model, numbers[f"accuracy, {name}"] = taught(Reads() | what, seed, STEPS)
        if name == "coarse to fine":
            order = torch.randperm(len(digits()[0]), generator=torch.Generator().manual_seed(seed))
            images = digits()[0][order[:HELD_OUT][:SHOWN]]
            middle = torch.ones(SHOWN, dtype=torch.long)
            with torch.no_grad(), attach(model, Reads() | what | _Looked()) as attached:
                attached(pixel_values=placed(images, middle, middle))
                shares = [float(x.value) for x in attached[_Looked()].values()]
            numbers["share of keys with weight"] = sum(shares) / len(shares)
    return 100 * (numbers["accuracy, coarse to fine"] - numbers["accuracy, coarse alone"]), numbers


CLAIM = Claim(
    key="P227",
    method="CoarseToFineAttention",
    says="Attention that picks a few cells and looks closely at what they hold does nearly as well as attention to "
    "all, and far better than attention to coarse cells alone.",
    paper_number="none in the abstract, which says that it reduces the complexity of attention",
    setup=f"A {LAYERS}-layer vision transformer trained {STEPS} steps on scikit-learn's digits, moved by 0 to 2 of "
    f"{SIDE} x {SIDE} patches, in cells of {CELL} x {CELL}; the control, which is the paper's, has a softmax over "
    "cells and a mean within each. Held-out accuracy. Details: softmax, and the share of keys that have any weight "
    f"on {SHOWN} digits. Three of the seeds had been seen before.",
    effect="points of accuracy above coarse cells alone",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
