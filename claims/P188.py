"""Lightning attention: is linear attention that fades on a par with softmax?"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from claims._linear import MARGIN, SETUP, losses
from claims._tiny_lm import HeadNorm
from claims.ledger import Claim, run
from heedful import Method, Site
from heedful.authoring import Call, at
from heedful.methods import LightningAttention


class _Even(Method):
    """The control: the same features and norm, and nothing fades."""

    paper = HeadNorm.paper

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = qkv
        mixed = (silu(q) @ silu(k).mT).tril() @ v
        return mixed * (mixed.square().mean((1, 3), keepdim=True) + 1e-6).rsqrt()


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = losses(seed, softmax=None, lightning=LightningAttention(), without_decay=_Even())
    return (1 + MARGIN) * numbers["loss, softmax"] - numbers["loss, lightning"], numbers


CLAIM = Claim(
    key="P188",
    method="LightningAttention",
    says="A language model of linear attention with decay is on a par with one of softmax attention.",
    paper_number="perplexity 24.03 on WikiText-103, softmax 24.78 (paper, of whole models of 45M weights)",
    setup=f"{SETUP} with softmax, with lightning attention, and with the same but no decay; held-out loss. A match is "
    "a loss at most 2 % above softmax's.",
    effect="nats a byte left below softmax's loss plus 2 %",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
