"""Key head g sees its last blocks, and of the past the blocks n with (n + g) mod stride = 0: a shard of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import CachedKV, Call, Mask, Method, Paper, PositiveInt, Site, Where, at
from heedful.core.mask import Blocks
from heedful.kit.budget import newest


class S2Attention(Method):
    """Context sharded among heads: each has a window and every few blocks of the past, and together they have all."""

    paper = Paper(
        "P165",
        "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
        "Xihui Lin, Yunan Zhang, Suyu Ge, Barun Patra, Vishrav Chaudhary, Hao Peng, Xia Song",
        2024,
        "2407.17678",
        differs=(
            "Shards are those of the authors' code for causal models, counted from where each text begins. Models that "
            "see later tokens have another pattern there, which is not here.",
            "The layers and heads that the paper leaves dense are left out by `.on(layers=..., heads=...)`.",
            "The cache drops what no later token sees; up to `block` tokens before the window stay longer than needed.",
        ),
    )
    block: PositiveInt = 64  # tokens a block; the authors: 64
    # latest blocks that every head sees, the query's own counted; Phi-3-small: 16
    local: PositiveInt = 16
    stride: PositiveInt = 8  # a head sees one in so many blocks of the past; Phi-3-small: 8

    @classmethod
    def neutral(cls) -> S2Attention:
        return cls(stride=1)

    @classmethod
    def example(cls) -> S2Attention:
        return cls(2, 1, 3)

    def idle(self, call: Call) -> bool:
        return call.cross or self.stride == 1

    def _shard(self, blocks: Tensor, call: Call, heads: int) -> Tensor:
        """Whether a block lies in the shard of each of so many heads, `[... h ...]` by the blocks `[b|1 h|1 ...]`."""
        group = torch.arange(heads, device=blocks.device) * call.kv_heads // heads
        step = max(1, self.stride // call.heads)  # few heads take shards that lie apart
        return (blocks + step * group.view(-1, *[1] * (blocks.dim() - 2))) % self.stride == 0

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        def sees(query: Tensor, key: Tensor) -> Tensor:
            return (query - key < self.local) | self._shard(key, call, call.heads)

        if None in (call.queries.first, call.queries.pads, call.keys.first, call.keys.pads):
            return mask & Where(lambda q, k: sees(q // self.block, k // self.block))
        (rows, top), (cols, left) = (self._blocks(place[:, 0]) for place in (call.q_pos, call.k_pos))
        first = torch.stack([top, left], -1)
        table = sees(rows[:, None, :, None], cols[:, None, None])
        return mask & Blocks(table, self.block, first if bool(first.any()) else None)

    def _blocks(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks of consecutive places `[b|1 n]`, and where in the row the first of them begins, `[b|1]`."""
        begins = place[:, 0]
        block = begins.clamp(min=0) // self.block
        first = block * self.block - begins
        count = (place.shape[1] - 1 - int(first.min())) // self.block + 1
        return block[:, None] + torch.arange(count, device=place.device), first

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        shard = self._shard(entries.positions.position // self.block, call, call.kv_heads)
        # the next query will see one more: itself
        return entries.is_text & (shard | newest(entries, call, self.local * self.block - 1))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, S2Attention(8, 4, 3)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
