"""MoBA: does a model that sees a third of the keys, block by block, recall what full attention recalls?"""

from __future__ import annotations

from claims._pairs import ASKED, PAIRS, VALUES, recall
from claims.ledger import Claim, run
from heedful import Site
from heedful.authoring import Call, Mask, Method, Paper, Where, at
from heedful.core.method import Stack
from heedful.methods import MoBA

STEPS = 400
SIZE, BLOCKS = 8, 3


class _Latest(Method):
    """The control: as many blocks, always the latest."""

    paper = Paper("claims", "A control of heedful's own", "heedful", 2026, venue="heedful")

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        return mask & Where(lambda q, k: q // SIZE - k // SIZE < BLOCKS)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {"full attention": Stack(), "MoBA": MoBA(SIZE, BLOCKS), "latest blocks": _Latest()}
    full, moba, latest = (recall(what, seed, STEPS) for what in ways.values())
    numbers = {f"recall, {name}": x for name, x in zip(ways, (full, moba, latest), strict=True)}
    return (moba - latest) / (full - latest), numbers


CLAIM = Claim(
    key="P171",
    method="MoBA",
    says="A model trained with a few routed blocks a query is as good as one with full attention.",
    paper_number="language-model losses within 0.001 of full attention",
    setup=f"A one-layer model told {PAIRS} pairs of a key and one of {VALUES} values, one a token, and asked for "
    f"{ASKED} of them; {STEPS} steps with full attention, with MoBA ({BLOCKS} blocks of {SIZE}, one of which holds the "
    "questions), and, as a control, with as many blocks that are always the latest. Share of fresh questions answered "
    "rightly.",
    effect="share of what full attention recalls beyond the latest blocks that MoBA recalls",
    measure=measure,
    strong=0.9,
)

if __name__ == "__main__":
    run(CLAIM)
