"""What methods share that keep a window of newest entries and, of the others, those that its queries vote for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from heedful.core.call import CachedKV, Call
from heedful.core.ranges import OddInt, PositiveInt, Share
from heedful.kit.budget import Budget, added_up, newest
from heedful.kit.scored_cache import ScoredCache
from heedful.kit.scores import last_weights

POOLS: dict[str, Callable[..., Tensor]] = {"max": max_pool1d, "mean": avg_pool1d}

VOTES = (  # what all of them do unlike the authors
    "The authors cut the prompt once; here later tokens vote too, so that decoding stays within the budget: "
    "a call of n tokens, one mostly, adds its votes, and what was voted before keeps 1 - n/w of its weight, "
    "nothing from a whole window on. With .when('prefill') it is the authors' way for one prompt; what is read later "
    "several tokens at once, as a second question, is a prompt too.",
    "The votes are one number for each token of the text and key head, also of tokens that were dropped.",
    "Votes of tokens that are cropped later, as in assisted decoding, fade like the others.",
    "Votes know of causality, padding, a soft cap and a bias; of narrower masks and learned sinks they do not.",
)


class VotedCache(ScoredCache, abstract=True):
    """The end of the text votes for what came before it; votes are pooled, so that neighbours stay together."""

    budget: Budget = 1024  # entries a head, the window included, or a share of the text
    window: PositiveInt = 32  # last queries that vote, and entries that stay
    kernel: OddInt = 5  # tokens that votes are pooled over, odd
    pool: Literal["max", "mean"] = "max"  # "max" or "mean"

    @classmethod
    def example(cls) -> Self:
        return cls(budget=6, window=2, kernel=3)

    def last(self, entries: CachedKV, call: Call) -> Tensor:
        """Which entries are in the window, `[b|1 1 k]`; where there is no room for all of it, the newest of it."""
        return newest(entries, call, self.most(call).clamp(max=self.window))

    def votes(self, entries: CachedKV, call: Call) -> Tensor:
        """What the last queries of all calls so far gave each entry, `[b g k]`."""
        weights, position = last_weights(entries, call, self.window)
        new = (position >= 0).sum(-1, keepdim=True)
        given = weights.unflatten(1, (call.kv_heads, -1)).sum((2, 3))
        return added_up("votes", given, entries, call, 1 - new / self.window)

    def pooled(self, entries: CachedKV, call: Call, last: Tensor) -> Tensor:
        """The pooled votes for each entry `[b g k]`, among those before the `last`."""
        return self.among(self.votes(entries, call), entries, last)

    def among(self, votes: Tensor, entries: CachedKV, last: Tensor) -> Tensor:
        """These votes `[b g k]`, pooled among the entries before the `last`."""
        place = entries.positions.position.clamp(min=0).expand(votes.shape)
        # an empty slot may bear a position that has votes
        nothing = last if entries.whole else last | ~entries.is_text
        end = entries.positions.end if entries.whole else int(place.max()) + 1
        in_text = votes.new_zeros(*votes.shape[:2], end)
        in_text.scatter_add_(-1, place, votes.masked_fill(nothing, 0.0))
        return POOLS[self.pool](in_text, self.kernel, 1, self.kernel // 2).gather(-1, place)


class UnevenCache(VotedCache, abstract=True):
    """Heads keep unlike numbers of entries, but each a share `floor` of what all would keep before the window."""

    floor: Share = 0.2

    def declares(self, tokens: int) -> dict[str, float]:
        return {}  # each head keeps another number
