"""Chunks by the most that their keys can score, sum_c max(q_c high_c, q_c low_c): the best are split, to a grain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from heedful.authoring import Call, Mask, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.positions import spread_heads
from heedful.kit.budget import Budget, all_fit, is_whole, room_for, rooms
from heedful.kit.chosen import Chosen


class LeoAM(Method):
    """Each query looks for its keys in a tree of chunks, of which two vectors each are read; the cache keeps all.

    The authors read the prompt in full: `LeoAM().when("decode")`.
    """

    paper = Paper(
        "P012",
        "Breaking the Boundaries of Long-Context LLM Inference: Adaptive KV Management on a Single Commodity GPU",
        "He Sun, Li Li, Mingjun Xiao, Chengzhong Xu",
        2025,
        "2506.20187",
        differs=(
            "The authors' full text was not at hand: this follows its abstract and summaries. How they set the sizes "
            "of chunks for each layer is not here; every query splits its own best ones.",
            "Nothing is moved between memories, compressed or fetched ahead: which keys are read is all that is here.",
            "As many chunks are kept at every size, so that the smallest hold the budget.",
            "The chunk that a query stands in is always seen, and the choice among others is by those that are whole.",
            "What a model adds to its scores does not count.",
        ),
    )
    one_text = True
    budget: Budget = 0.1  # tokens that a query sees, beside those of its own smallest chunk
    grain: PositiveInt = 8  # tokens of the smallest chunks
    # times that a chunk is halved: the largest hold grain * 2**splits tokens
    splits: Annotated[int, Interval(ge=0, le=20)] = 3

    @classmethod
    def neutral(cls) -> LeoAM:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> LeoAM:
        return cls(2, 2, 1)

    def rests(self, tokens: int) -> str | None:
        return all_fit(max(self.grain, room_for(self.budget, tokens)), tokens, "a smaller budget")

    def idle(self, call: Call) -> bool:
        return call.cross or is_whole(self.budget)

    @at(Site.MASK)
    def search(self, mask: Mask, call: Call) -> Mask:
        if not mask.causal:
            return mask
        if call.query is None or call.key is None:
            raise SiteError(f"{self!r}, layer {call.layer}: bounds scores by queries and keys, and is handed none")
        query = call.query.detach().to(torch.promote_types(call.query.dtype, torch.float32))
        leaf = (call.k_pos // self.grain).clamp(min=0)  # [b|1 g|1 k]
        tree = _tree(call, leaf, self.splits)
        heads = call.heads
        room = (rooms(self.budget, call.q_pos[:, 0].clamp(min=0) + 1) // self.grain).clamp(min=1)  # [b|1 q]

        def pick(rows: slice) -> Tensor:
            q, place = query[:, :, rows], call.q_pos[:, :, rows, None].clamp(min=0)
            seen = self._down(tree, q, place, room[:, None, rows, None])
            mine = spread_heads(leaf, heads)[:, :, None].expand(*seen.shape[:3], -1)
            return seen.gather(-1, mine)

        return mask & Chosen(pick)

    def _down(self, tree: list[_Chunks], query: Tensor, place: Tensor, room: Tensor) -> Tensor:
        """Which of the smallest chunks some queries see, `[b h r m]`."""
        kept: Tensor | None = None
        for level in range(self.splits, -1, -1):
            bound = tree[level].bound(query)
            chunk, own = torch.arange(bound.shape[-1], device=bound.device), place // (self.grain << level)
            open_ = chunk < own if kept is None else (chunk < own) & kept.repeat_interleave(2, -1)
            bound = bound.masked_fill(~open_, -torch.inf)
            best = bound.topk(min(int(room.max()), bound.shape[-1]))
            counted = (torch.arange(best.indices.shape[-1], device=bound.device) < room) & (best.values > -torch.inf)
            kept = torch.zeros_like(bound, dtype=torch.bool).scatter(-1, best.indices, counted) | (chunk == own)
        return kept  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class _Chunks:
    """Of chunks of one size, the highest and the lowest of their keys in each channel; infinite where there is none."""

    high: Tensor  # [b g m d]
    low: Tensor

    def bound(self, query: Tensor) -> Tensor:
        """What the best key of each chunk scores at most, `[b h r m]`; minus infinity where there is none."""
        b, h, r, d = query.shape
        empty = self.high[..., 0] < self.low[..., 0]
        high, low = (x.masked_fill(empty[..., None], 0) for x in (self.high, self.low))
        grouped = query.reshape(b, high.shape[1], -1, d)
        found = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
        return found.masked_fill(empty[:, :, None], -torch.inf).view(b, h, r, -1)


def _tree(call: Call, leaf: Tensor, splits: int) -> list[_Chunks]:
    """Chunks of all sizes, the smallest first."""
    key = call.key.detach().to(torch.promote_types(call.key.dtype, torch.float32))  # type: ignore[union-attr]
    held = (call.k_pos >= 0).expand(key.shape[:3])
    if call.keys.is_filled is not None:
        held = held & call.keys.is_filled
    leaf, size = leaf.where(held, 0), 1 << splits
    count = -(-(int(leaf.max()) + 1) // size) * size
    index, shape = leaf[..., None].expand(key.shape), (*key.shape[:2], count, key.shape[3])
    high = key.new_full(shape, -torch.inf).scatter_reduce(
        2, index, key.masked_fill(~held[..., None], -torch.inf), "amax"
    )
    low = key.new_full(shape, torch.inf).scatter_reduce(2, index, key.masked_fill(~held[..., None], torch.inf), "amin")
    tree = [_Chunks(high, low)]
    for _ in range(splits):
        high, low = high.unflatten(2, (-1, 2)).amax(3), low.unflatten(2, (-1, 2)).amin(3)
        tree.append(_Chunks(high, low))
    return tree


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, LeoAM(32).when("decode")) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
