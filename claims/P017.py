"""MALA: does the queries' magnitude help linear attention?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._tiny_lm import HeadNorm, Trained
from claims.ledger import Claim, run
from heedful import Method, Site
from heedful.authoring import Call, at
from heedful.methods.mechanisms.linear.mala import MALA, features

STEPS = 200


class PlainLinear(Method):
    """Linear attention whose weights are s over their sum: how long a query is cannot matter."""

    paper = HeadNorm.paper

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        s = (features(q) @ features(k).mT).tril()
        return s / s.sum(-1, keepdim=True) @ v


def sharpening(method: Method, seed: int) -> float:
    """How far the weights of one head move, in total variation, when its queries' features become fourfold."""
    random = torch.Generator().manual_seed(seed)
    phi_q, phi_k = (features(torch.randn(32, 16, generator=random)) for _ in range(2))
    moved = []
    for factor in (1.0, 4.0):
        s = factor * phi_q @ phi_k.T / 16**0.5 / 32
        z = s.sum(-1, keepdim=True)
        moved.append(s / z if isinstance(method, PlainLinear) else (1 + 1 / z) * s - z / 32)
    return float((moved[0] - moved[1]).abs().sum(-1).mean() / 2)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {f"loss, {type(m).__name__}": Trained(m, seed, STEPS).loss() for m in (PlainLinear(), MALA())}
    numbers["loss, softmax"] = Trained(None, seed, STEPS).loss()
    numbers |= {f"sharpening, {type(m).__name__}": sharpening(m, seed) for m in (PlainLinear(), MALA())}
    return numbers["loss, PlainLinear"] - numbers["loss, MALA"], numbers


CLAIM = Claim(
    key="P017",
    method="MALA",
    says="Linear attention whose weights depend on the query's magnitude does better than plain linear attention.",
    paper_number="84.7 % on ImageNet-1K with 27M parameters; none given for plain linear attention in the abstract",
    setup=f"A causal 2-layer byte model trained {STEPS} steps on Python's documentation with linear attention (ELU + "
    "1) and with MALA; held-out loss. Details: softmax's loss, and how far weights move when a query's features grow "
    "fourfold.",
    effect="nats a byte that plain linear attention loses more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
