"""Linear log-normal attention: is it better than other features beside the same blocks?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._linear import SETUP, Divided, Elu, losses
from claims.ledger import Claim, run
from heedful import Site
from heedful.authoring import Call, at
from heedful.methods import LLNAttention

BLOCK = 16  # tokens; a head is as wide


class _Blocks(Divided):
    """The control: ELU + 1 in place of exponentials of matched spread, beside the same blocks of softmax."""

    def features(self, x: Tensor) -> Tensor:
        return Elu().features(x)

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        place = call.q_pos[0, 0]
        near = (place[:, None] // BLOCK == place // BLOCK).tril()
        weights = (q @ k.mT * call.scale).masked_fill(~near, -torch.inf).softmax(-1)
        return (super().attend(qkv, call) + weights @ v) / 2


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = losses(
        seed, softmax=None, LLN_and_blocks=LLNAttention(BLOCK), ELU_and_blocks=_Blocks(), LLN=LLNAttention(0), ELU=Elu()
    )
    return numbers["loss, ELU and blocks"] - numbers["loss, LLN and blocks"], numbers


CLAIM = Claim(
    key="P236",
    method="LLNAttention",
    says="Features whose weights spread as softmax's do outperform other linear attention.",
    paper_number="none given in the abstract",
    setup=f"{SETUP} with LLN and with ELU + 1 features, both with blocks of {BLOCK} tokens of softmax beside them; "
    "held-out loss. Details: both without the blocks, and softmax.",
    effect="nats a byte that ELU features with the same blocks lose more",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
