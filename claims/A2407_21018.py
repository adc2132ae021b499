"""ThinK: do the last queries know which channels of the keys a text's continuation can do without?

It was first held against channels at random, which keys alone beat too; the control was changed after that was seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._cache import losses, memory, prose
from claims.ledger import Claim, run
from heedful.core.call import CachedKV, Call
from heedful.methods.sparse.cache.think import ThinK

TOKENS, REST, SHARE = 384, 128, 0.4


class AnyChannels(ThinK):
    """The easier control: as many channels at random."""

    def least(self, entries: CachedKV, call: Call) -> Tensor:
        b, g, _, d = entries.key.shape
        order = torch.rand(b, g, d, generator=torch.Generator().manual_seed(call.layer)).argsort(-1)
        gone = order[..., : int(self.share * d)]
        return torch.zeros(b, g, d, dtype=torch.bool).scatter_(-1, gone, True)


class ShortChannels(ThinK):
    """The control: those in which the keys alone are short, whatever is asked."""

    def least(self, entries: CachedKV, call: Call) -> Tensor:
        held = (entries.key.float() * entries.is_text[..., None]).square().sum(2)
        gone = held.argsort(-1)[..., : int(self.share * held.shape[-1])]
        return torch.zeros_like(held, dtype=torch.bool).scatter_(-1, gone, True)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text = prose(seed, TOKENS, REST)
    numbers = {}
    for name, method in (
        ("all channels", None),
        ("ThinK", ThinK(SHARE)),
        ("random channels", AnyChannels(SHARE)),
        ("channels of long keys", ShortChannels(SHARE)),
    ):
        numbers[f"loss, {name}"] = losses(text, method)
    numbers["memory of the cache"] = memory(text, ThinK(SHARE))
    return numbers["loss, channels of long keys"] - numbers["loss, ThinK"], numbers


CLAIM = Claim(
    key="2407.21018",
    method="ThinK",
    says="The last queries tell which channels of the keys can be dropped, and not the keys alone.",
    paper_number="40% of the key channels dropped with accuracy maintained: over 20% of the cache's memory (abstract)",
    setup=f"SmolLM2-135M, {TOKENS} tokens of prose, {SHARE:.0%} of the key channels dropped from all entries but the "
    f"newest 32, and the loss of the next {REST} tokens, against as many channels in which the keys are short, "
    "which asks no query. As many at random are in the details; they were the control at first.",
    effect="nats of loss per token that asking queries beside keys saves",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
