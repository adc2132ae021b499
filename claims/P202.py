"""Combiner: does one key a block, with a mean of the block, tell more of the past than one token of each block?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Mask, Method, Rule, Site, at
from heedful.core.positions import Pairs
from heedful.methods import Combiner

SIZE = 8


@dataclass(frozen=True)
class _Fixed(Rule):
    """The query's own block, and the last token of each."""

    ends: bool

    def keeps(self, pairs: Pairs) -> Tensor:
        own = pairs.q // SIZE == pairs.k // SIZE
        return own | (pairs.k % SIZE == SIZE - 1) if self.ends else own


class _Sparse(Method):
    """The controls: as many keys, without a summary; and a block alone."""

    ends: bool

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & _Fixed(self.ends)


WAYS = {"softmax": None, "Combiner": Combiner(SIZE), "last tokens": _Sparse(True), "own block": _Sparse(False)}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    return min(found["loss, last tokens"], found["loss, own block"]) - found["loss, Combiner"], found


CLAIM = Claim(
    key="P202",
    method="Combiner",
    says="Attention to all tokens by way of their blocks is better than attention of the same cost to some.",
    paper_number="state-of-the-art results on image and text modelling (abstract, no figure)",
    setup=f"The lab's text course, {BYTES.steps} steps, texts of {BYTES.length}, with Combiner of blocks of {SIZE}, "
    "with the own block and the last token of each earlier one, and with the own block alone; loss on another held-out "
    "tenth a seed. Details: softmax over all tokens.",
    effect="nats a byte below the better of the two that see some tokens",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
