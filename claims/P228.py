"""Rectified attention: does it train as well as softmax, with most weights at zero and heads that switch off?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import LAB, SHORT, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Mean, Method, Site, at, reads
from heedful.methods import RectifiedAttention

MARGIN = 0.02  # of softmax's loss, as in the claim about sigmoid attention: what we still call a match


class _Bare(Method):
    """The control: the same without the norm and its gate."""

    @at(Site.NORMALISE)
    def rectify(self, scores: Tensor, call: Call) -> Tensor:
        return torch.relu(scores)


class _Zeros(Method):
    """The share of pairs that weigh nothing, and of rows in which nothing weighs anything."""

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        keep = torch.ones_like(weights, dtype=torch.bool) if call.keep is None else call.keep.expand_as(weights)
        zero = (weights == 0) & keep
        rows = (zero | ~keep).all(-1)
        of = torch.stack([keep.sum(), torch.tensor(rows.numel())])
        return Mean.of(torch.stack([zero.sum(), rows.sum()]).double(), of)


WAYS = {"softmax": None, "ReLA": RectifiedAttention(), "without the norm": _Bare()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss")
    with LAB.opened(SHORT, WAYS["ReLA"], seed, zeros := _Zeros()) as opened:
        SHORT.loss(opened, seed)
        pairs, rows = torch.stack([mean.value for mean in opened[zeros].values()]).mean(0).tolist()
    found |= {"share of weights at zero": pairs, "share of rows that look at nothing": rows}
    return (1 + MARGIN) * found["loss, softmax"] - found["loss, ReLA"], found


CLAIM = Claim(
    key="P228",
    method="RectifiedAttention",
    says="Attention by ReLU and a gated norm matches softmax, with most weights exactly zero.",
    paper_number="translation on four tasks from 0.3 BLEU below softmax to 0.7 above (the authors' README); high "
    "sparsity, some rows look at nothing",
    setup=f"The lab's text course, {SHORT.steps} steps, with softmax, with ReLA, and with ReLU alone; loss on another "
    "held-out tenth a seed. A match is a loss at most 2 % above softmax's.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
