"""TOVA: does the newest query know which entries to keep, better than chance and than sinks and a window?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._cache import Newest, losses, prose
from claims.ledger import Claim, run
from heedful.core.call import CachedKV, Call
from heedful.core.sites import Site, at
from heedful.methods.sparse.cache.tova import TOVA

TOKENS, REST, BUDGET = 384, 128, 0.25


class AnyEntries(TOVA):
    """A control: entries stay at random, the same in all heads of a layer."""

    @at(Site.CACHE)
    def omit(self, entries: CachedKV, call: Call) -> Tensor:
        source = torch.Generator().manual_seed(call.layer + 1000 * int(call.q_pos.max()))
        score = torch.rand(entries.key.shape[2], generator=source)
        return self.best(score.expand(entries.key.shape[:3]), entries, call)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text = prose(seed, TOKENS, REST)
    numbers = {}
    for name, method in (
        ("everything", None),
        ("TOVA", TOVA(BUDGET)),
        ("random entries", AnyEntries(BUDGET)),
        ("sinks and newest", Newest(BUDGET)),
    ):
        numbers[f"loss, {name}"] = losses(text, method)
    return numbers["loss, sinks and newest"] - numbers["loss, TOVA"], numbers


CLAIM = Claim(
    key="2401.06104",
    method="TOVA",
    says="The weights of the newest query alone tell which entries may go, better than other fixed-size policies do.",
    paper_number="nearly on par with the full model at an eighth of its cache in some cases, ahead of several "
    "policies (abstract)",
    setup=f"SmolLM2-135M, {TOKENS} tokens of prose, the cache cut to {BUDGET:.0%}, and the loss of the next {REST} "
    "tokens, against four first and the newest entries, which the paper's comparison has too; entries at random are in "
    "the details.",
    effect="nats of loss per token that TOVA saves at equal memory",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
