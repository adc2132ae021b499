"""Spark attention: is looking at some keys, told by half of the channels and without sorting, as good as at all?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import BYTES, LAB, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Mean, Method, Site, at, reads
from heedful.methods import SparkAttention

KEEP = 16
MARGIN = 0.02  # of softmax's loss, as in other claims of a match: what we still call one


class _Best(Method):
    """The control: softmax over as many keys of the highest scores of all channels, found by sorting."""

    keep: int = KEEP

    @at(Site.SCORES)
    def choose(self, scores: Tensor, call: Call) -> Tensor:
        keep = torch.ones_like(scores, dtype=torch.bool) if call.keep is None else call.keep
        seen = scores.masked_fill(~keep, -torch.inf)
        least = seen.detach().topk(min(self.keep, seen.shape[-1]), -1).values[..., -1:]
        return scores.masked_fill(seen < least, -torch.inf)


class _Looked(Method):
    """How many keys a row looks at that sees more than it is to look at."""

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Mean:
        keep = torch.ones_like(weights, dtype=torch.bool) if call.keep is None else call.keep.expand_as(weights)
        many = keep.sum(-1) > KEEP
        return Mean.of((weights > 0).sum(-1)[many].sum().double(), many.sum())


WAYS = {"softmax": None, "Spark": SparkAttention(KEEP), "highest scores": _Best()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    with LAB.opened(BYTES, WAYS["Spark"], seed, looked := _Looked()) as opened:
        BYTES.loss(opened, seed)
        keys = torch.stack([mean.value for mean in opened[looked].values()]).mean()
    found["keys looked at"] = float(keys)
    return (1 + MARGIN) * found["loss, softmax"] - found["loss, Spark"], found


CLAIM = Claim(
    key="P292",
    method="SparkAttention",
    says="Attention to a limited number of keys, told by half of the channels without sorting, is as good as to all.",
    paper_number="Gemma-2 of 2B with at most 256 keys a token, and sparse feed-forward parts: near its quality",
    setup=f"The lab's text course, {BYTES.steps} steps on texts of {BYTES.length}, with softmax, with Spark attention "
    f"to some {KEEP} keys, and with softmax over the {KEEP} highest scores; loss on another held-out tenth a seed. A "
    "match is a loss at most 2 % above softmax's. The first run, not changed after it was seen.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
