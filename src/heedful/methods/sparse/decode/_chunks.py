"""Chunks of queries that choose together which few tokens they see: what the methods that do so have in common."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, all_fit, is_whole, room_for, rooms
from heedful.kit.chosen import Chosen


class ChunkChoice(Method, abstract=True):
    """Sinks, a window and the chunk itself are seen anyway; what a method adds to them is its own choice."""

    causal = False  # the last queries of a chunk have a say in what the first ones see
    chunk_invariant = False  # a new token chooses alone, and in a prompt its chunk does
    budget: Budget = 2688  # tokens seen, a share never fewer than sinks and window
    sinks: NonNegativeInt = 128  # first tokens that are always seen
    window: int = 512  # newest tokens that are always seen, the chunk's included
    chunk: PositiveInt = 512  # queries of a prompt that choose together

    def __post_init__(self) -> None:
        if self.window < self.chunk:
            raise FieldError(
                self, "window", self.window, f"must hold the chunk of {self.chunk}, or it is not all seen", self.chunk
            )
        least = self.sinks + self.window
        if isinstance(self.budget, int) and self.budget < least:
            rule = f"must hold the {self.sinks} sinks and the window of {self.window}, which are always seen"
            raise FieldError(self, "budget", self.budget, rule, least)

    @abstractmethod
    def best(self, query: Tensor, key: Tensor, call: Call, member: Tensor, always: Tensor, most: Tensor) -> Tensor:
        """Which tokens each chunk sees beside those of `always [b|1 1 c k]`, at most `most [b|1 c 1]`: `[b c k]`.

        `member [b|1 c q]` tells whose queries they are.
        """

    def rests(self, tokens: int) -> str | None:
        room = max(room_for(self.budget, tokens), self.sinks + self.window)
        return all_fit(room, tokens, "smaller sinks, window and budget")

    def idle(self, call: Call) -> bool:
        return call.cross or is_whole(self.budget)

    @at(Site.MASK)
    def select(self, mask: Mask, call: Call) -> Mask:
        if call.query is None or call.key is None:
            return mask
        held = [x for x in (call.k_pos, call.keys.is_filled) if x is not None and x.shape[1] > 1]
        if any(bool((x != x[:, :1]).any()) for x in held):
            rule = "heads hold unlike tokens, so they cannot choose together; keep the cache whole"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}")
        is_text, place = call.is_text[:, 0], call.q_pos[:, 0]
        number = place // self.chunk
        number = (number - number.where(is_text, number.amax()).amin(-1, keepdim=True)).clamp(min=0)  # [b|1 q]
        member = torch.nn.functional.one_hot(number).mT.bool() & is_text[:, None]  # [b|1 c q]
        end = place[:, None].where(member, -1).amax(-1) + 1  # [b|1 c]
        key = call.k_pos[:, :1, None]  # [b|1 1 1 k]
        recent = key >= (end - self.window)[:, None, :, None]
        always = recent | (key < self.sinks)  # [b|1 1 c k]
        if call.keys.is_filled is not None:
            always = always | ~call.keys.is_filled[:, :1, None]  # nobody sees these, whatever is chosen
        if bool(always.all()):
            return mask
        most = (rooms(self.budget, end) - self.sinks - self.window).clamp(min=0)[..., None]  # [b|1 c 1]
        table = self.best(call.query, call.key, call, member, always, most) | always[:, 0]  # [b c k]
        if bool(table.all()):
            return mask
        text = torch.arange(len(table), device=table.device)[:, None]
        return mask & Chosen(lambda rows: table[text, number[:, rows]][:, None])


def means(query: Tensor, share: Tensor) -> Tensor:
    """Of each chunk the mean of its queries, weighted by `share [b|1 c q]`, `[b h c d]`."""
    return share[:, None].float() @ query.detach().float()
