"""Flowformer: do conserved flows help linear attention?"""

from __future__ import annotations

from claims._linear import SETUP, Sigmoid, losses
from claims.ledger import Claim, run
from heedful.methods import FlowAttention


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = losses(seed, softmax=None, flow=FlowAttention(), without_flows=Sigmoid())
    return numbers["loss, without flows"] - numbers["loss, flow"], numbers


CLAIM = Claim(
    key="P053",
    method="FlowAttention",
    says="Competition and allocation by conserved flows make linear attention better.",
    paper_number="perplexity 30.8 on WikiText-103, Performer 37.5, softmax 33.0",
    setup=f"{SETUP} with flow attention, and with linear attention of the same features and no flows; held-out loss. "
    "Details: softmax's loss.",
    effect="nats a byte that the same features without flows lose more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
