"""Head embeddings: do heads of one projection, told apart by an embedding each, match heads with their own?"""

from __future__ import annotations

from torch import Tensor

from claims._lab import BYTES, numbers
from claims.ledger import Claim, run
from heedful.authoring import Call, Method, Site, at
from heedful.methods import MHE

MARGIN = 0.02  # of softmax's loss, as in other claims of a match: what we still call one


class _Shared(Method):
    """The control: the same projections for all heads, and nothing that tells them apart."""

    @at(Site.QUERY)
    def ask(self, query: Tensor, call: Call) -> Tensor:
        return query[:, :1].expand_as(query)

    @at(Site.KEY)
    def offer(self, key: Tensor, call: Call) -> Tensor:
        return key[:, :1].expand_as(key)

    @at(Site.VALUE)
    def tell(self, value: Tensor, call: Call) -> Tensor:
        return value[:, :1].expand_as(value)


WAYS = {"own projections": None, "multiplied": MHE(), "added": MHE("sum"), "no embeddings": _Shared()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss", course=BYTES)
    return (1 + MARGIN) * found["loss, own projections"] - found["loss, multiplied"], found


CLAIM = Claim(
    key="P187",
    method="MHE",
    says="Heads of one projection that an embedding each tells apart do nearly as well as heads with projections of "
    "their own.",
    paper_number="high performance retention at 3 n d more weights than a single head (abstract, which gives no score)",
    setup=f"The lab's text course, {BYTES.steps} steps, with own projections for each head, with the first head's for "
    "all and an embedding each that is multiplied with, or added, and with the first head's for all and nothing else; "
    "loss on another held-out tenth a seed. A match is a loss at most 2 % above that of own projections. The first "
    "run, not changed after it was seen.",
    effect="nats a byte left below the loss of own projections plus 2 %, by embeddings that are multiplied with",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
