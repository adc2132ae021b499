"""What methods share that ask where a prompt's last token looks in an image, and hide what it does not look at."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.kinds.tokens import Prompt
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum
from heedful.kit.picked import best


class _Looks(Method):
    """What a prompt's last token gives to each of some places, heads averaged, in layers that see nothing ahead."""

    end: int  # the number of the last token
    places: tuple[int, ...]

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum | None:
        mine = (call.q_pos[0, 0] == self.end).nonzero().flatten()
        if not len(mine) or not call.causal or call.cross:
            return None
        found = call.k_pos[0, 0, :, None] == torch.tensor(self.places, device=weights.device)
        return Sum.of(weights[0, :, mine[0]].mean(0) @ found.to(weights))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return dict(zip(readings, readings.values_by_layer, strict=True))


class _Hidden(Method):
    """Some tokens of a prompt are seen by nobody but themselves."""

    places: tuple[int, ...]

    @at(Site.MASK)
    def hide(self, mask: Mask, call: Call) -> Mask:
        gone = torch.tensor(self.places, device=call.k_pos.device)
        return mask & Where(lambda q, k: ~torch.isin(k, gone) | (q == k))


def places_of(prompt: Prompt, role: str = "image") -> tuple[int, ...]:
    """The numbers of a role's tokens."""
    return tuple(sorted({i for span in prompt.spans(role) for i in range(*span)}))


def lowest(places: tuple[int, ...], score: Tensor, share: float) -> tuple[int, ...]:
    """The places that are left when those of the highest score `[n]` are taken, a share of all, rounded up."""
    kept = best(score[None], ceil(share * len(places)))[0]
    return tuple(place for place, stays in zip(places, kept.tolist(), strict=True) if not stays)
