"""Efficient attention: does it come as near to dot-product attention as its authors say?"""

from __future__ import annotations

from torch import Tensor

from claims._linear import MARGIN, SETUP, Elu, losses
from claims._tiny_lm import HeadNorm
from claims.ledger import Claim, run
from heedful import Method, Site
from heedful.authoring import Call, at
from heedful.methods import EfficientAttention


class _Unnormalised(Method):
    """The control: Q (K^T V) over the number of keys, which is the paper's other way to normalise."""

    paper = HeadNorm.paper

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        return (q @ k.mT).tril() / (call.q_pos[..., None] + 1) @ v


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = losses(
        seed, softmax=None, efficient=EfficientAttention(), without_softmaxes=_Unnormalised(), plain_linear=Elu()
    )
    return (1 + MARGIN) * numbers["loss, softmax"] - numbers["loss, efficient"], numbers


CLAIM = Claim(
    key="P117",
    method="EfficientAttention",
    says="Efficient attention takes the place of dot-product attention at linear cost and loses nothing.",
    paper_number="none given in the abstract",
    setup=f"{SETUP} with softmax, with efficient attention, with Q (K^T V) / n, which is the paper's other way to "
    "normalise, and with plain linear attention (ELU + 1); held-out loss. A match is a loss at most 2 % above "
    "softmax's.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
