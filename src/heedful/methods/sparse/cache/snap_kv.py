"""Keep the newest w entries and, of the others, those that the last w queries vote for: pool(sum of softmax)."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from heedful.core.call import CachedKV, Call
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, added_up, keep_best, newest, require_budget, room, room_for

POOLS: dict[str, Callable[..., Tensor]] = {"max": max_pool1d, "mean": avg_pool1d}


class SnapKV(Method):
    """The end of the text votes for what came before it; votes are pooled, so that neighbours stay together."""

    paper = Paper(
        "2404.14469",
        "SnapKV: LLM Knows What You are Looking for Before Generation",
        "Yuhong Li, Yingbing Huang, Bowen Yang, Bharat Venkitesh, Acyr Locatelli, Hanchen Ye, Tianle Cai, "
        "Patrick Lewis, Deming Chen",
        2024,
        "2404.14469",
        "NeurIPS 2024",
        differs=(
            "The authors cut the prompt once; here later tokens vote too, so that decoding stays within the budget: "
            "a call of n tokens, one mostly, adds its votes, and what was voted before keeps 1 - n/w of its weight, "
            "nothing from a whole window on. SnapKV(...).when('prefill') is the authors' way.",
            "The votes are one number for each token of the text and key head, also of tokens that were dropped.",
            "Votes of tokens that are cropped later, as in assisted decoding, fade like the others.",
            "A group of query heads votes as one; the authors' code keeps a cache for each query head.",
            "Votes know of causality, padding and a soft cap; of narrower masks, biases and learned sinks they do not.",
        ),
    )
    chunk_invariant = False  # what is dropped after one call, the next cannot see
    budget: Budget = 1024  # entries a head, the window included, or a share of the text; the paper: 1024 to 4096
    window: int = 32  # last queries that vote, and entries that stay; the authors' code: 32, the paper 16 or 32
    kernel: int = 5  # tokens that votes are pooled over, odd; the authors' code: 5, the paper 5 or 7
    pool: str = "max"  # "max" as in the paper, or "mean", the default of the authors' code

    def __post_init__(self) -> None:
        require_budget(self, self.budget)
        if self.window < 1:
            raise FieldError(self, "window", self.window, "must be 1 or more tokens", 32)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise FieldError(self, "kernel", self.kernel, "must be odd, 1 or more tokens", 5)
        if self.pool not in POOLS:
            raise FieldError(self, "pool", self.pool, f"must be one of {', '.join(POOLS)}", "max")

    @classmethod
    def neutral(cls) -> SnapKV:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> SnapKV:
        return cls(budget=6, window=2, kernel=3)

    def declares(self, tokens: int) -> dict[str, float]:
        return {"kept": min(tokens, room_for(self.budget, tokens))}

    @at(Site.CACHE)
    def snap(self, entries: CachedKV, call: Call) -> Tensor:
        queries, position = self._last(call)
        new = (position >= 0).sum(-1, keepdim=True)
        votes = added_up("votes", _votes(queries, position, entries, call), entries, call, 1 - new / self.window)
        most = room(self.budget, call)
        if len(entries.positions) <= int(most.min()):
            return entries.is_filled
        last = newest(entries, call, most.clamp(max=self.window))
        place = entries.positions.position.clamp(min=0).expand(votes.shape)  # padding has no votes to add
        in_text = votes.new_zeros(*votes.shape[:2], int(place.max()) + 1)
        in_text.scatter_add_(-1, place, votes.masked_fill(last, 0.0))
        pooled = POOLS[self.pool](in_text, self.kernel, 1, self.kernel // 2)
        return keep_best(pooled.gather(-1, place).masked_fill(last, torch.inf), entries, most)

    def _last(self, call: Call) -> tuple[Tensor, Tensor]:
        """The call's last queries of each text `[b h w d]` and where they stand `[b 1 w]`, -1 for no text."""
        query = cast(Tensor, call.query)
        back = torch.arange(min(self.window, len(call.queries)) - 1, -1, -1, device=query.device)
        rows = (call.last[..., None] - back).expand(len(query), 1, -1)
        place = call.q_pos.masked_fill(~call.is_text, -1).expand(len(query), 1, -1)
        position = place.gather(2, rows.clamp(min=0)).masked_fill(rows < 0, -1)
        index = rows.clamp(min=0)[..., None].expand(-1, query.shape[1], -1, query.shape[3])
        return query.gather(2, index), position


def _votes(queries: Tensor, position: Tensor, entries: CachedKV, call: Call) -> Tensor:
    """What the queries together give to each entry, `[b g k]`."""
    b, g, k, _ = entries.key.shape
    packed = queries.float().reshape(b, g, -1, queries.shape[-1])  # a group's heads above one another
    scores = (packed @ entries.key.float().mT * call.scale).view(b, g, -1, queries.shape[2], k)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    place = entries.positions.position[:, :, None, :]
    seen = entries.is_text[:, :, None] & (place <= position[..., None])
    weights = scores.masked_fill(~seen[:, :, None], torch.finfo(scores.dtype).min).softmax(-1)
    return weights.masked_fill(~seen[:, :, None], 0.0).sum((2, 3))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, SnapKV(64, window=16)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
