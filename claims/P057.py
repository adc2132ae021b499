"""Aaren: is one learned query for all tokens as good as a query for each?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Method, Site, at
from heedful.methods import Aaren

MARGIN = 0.02  # of softmax's loss, as in other claims of a match: what we still call one


class _Even(Method):
    """The control: a query of nothing, so that every token is the plain mean of those so far."""

    @at(Site.SCORES)
    def level(self, scores: Tensor, call: Call) -> Tensor:
        return torch.zeros_like(scores)


WAYS = {"softmax": None, "Aaren": Aaren(), "plain mean": _Even()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    return (1 + MARGIN) * found["loss, softmax"] - found["loss, Aaren"], found


CLAIM = Claim(
    key="P057",
    method="Aaren",
    says="Attention with one learned query, whose state has a fixed size, is comparable to a transformer's.",
    paper_number="comparable performance on 38 datasets of reinforcement learning, events and time series (abstract)",
    setup=f"The lab's text course, {BYTES.steps} steps, with softmax, with Aaren, and with plain means of the values "
    "so far; loss on another held-out tenth a seed. A match is a loss at most 2 % above softmax's. Language is not "
    "among the paper's tasks, and its authors expect queries that do not depend on the input to limit a model there.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
