"""S2Attention: if every head sees a shard of its own, is what all together see as good as full attention?"""

from __future__ import annotations

from torch import Tensor

from claims._pairs import ASKED, PAIRS, VALUES, recall
from claims.ledger import Claim, run
from heedful import Site
from heedful.authoring import Call, Mask, Method, Paper, Where, at
from heedful.core.method import Stack
from heedful.methods import S2Attention

STEPS = 400
HEADS = 4
SHARDS = S2Attention(block=4, local=2, stride=HEADS)


class _OneShard(Method):
    """The control: as many pairs, and the same shard for every head."""

    paper = Paper("claims", "A control of heedful's own", "heedful", 2026, venue="heedful")

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        def sees(q: Tensor, k: Tensor) -> Tensor:
            q, k = q // SHARDS.block, k // SHARDS.block
            return (q - k < SHARDS.local) | (k % SHARDS.stride == 0)

        return mask & Where(sees)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"full attention": Stack(), "a shard a head": SHARDS, "one shard": _OneShard()}
    full, own, one = (recall(what, seed, STEPS, HEADS) for what in ways.values())
    numbers = {f"recall, {name}": x for name, x in zip(ways, (full, own, one), strict=True)}
    return (own - one) / (full - one), numbers


CLAIM = Claim(
    key="P165",
    method="S2Attention",
    says="Heads with shards of their own, which together are the whole context, are as good as full attention.",
    paper_number="perfect needle retrieval over 32K tokens; quality on par with default attention",
    setup=f"A one-layer model of {HEADS} heads told {PAIRS} pairs of a key and one of {VALUES} values, one a token, "
    f"and asked for {ASKED} of them; {STEPS} steps with full attention, with blocks of {SHARDS.block} of which each "
    f"head sees the last {SHARDS.local} and one in {SHARDS.stride}, and, as a control, with one shard for all heads. "
    "Share of fresh questions answered rightly.",
    effect="share of what full attention recalls beyond one shard that shards of their own recall",
    measure=measure,
    strong=0.9,
)

if __name__ == "__main__":
    run(CLAIM)
