"""Each query sees its own block of keys, and the past blocks with the highest <q, mean k>: a softmax over these."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Mask, Method, Paper, PositiveInt, Site, at
from heedful.core.flags import both, either
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Chosen, by_block


class MoBA(Method):
    """Mixture of block attention: every token of every head is routed to a few blocks of keys, without a parameter."""

    paper = Paper(
        "P171",
        "MoBA: Mixture of Block Attention for Long-Context LLMs",
        "Enzhe Lu, Zhejun Jiang, Jingyuan Liu, Yulun Du, Tao Jiang, Chao Hong, Shaowei Liu, Weiran He, Enming Yuan, "
        "Yuzhi Wang, Zhiqi Huang, Huan Yuan, Suting Xu, Xinran Xu, Guokun Lai, Yanru Chen, Huabin Zheng, Junjie Yan, "
        "Jianlin Su, Yuxin Wu, Neo Y. Zhang, Zhilin Yang, Xinyu Zhou, Mingxing Zhang, Jiezhong Qiu",
        2025,
        "2502.13189",
        differs=(
            "New tokens choose blocks as those of the prompt do; the authors' code decodes with full attention.",
            "Blocks are counted from where each text begins; the authors' layer for transformers counts padding too.",
            "Means of keys are float32 at least; the authors round them to the keys' own type before the product.",
            "Blocks are a mask's, query by query: queries of one block are laid beside one another, as by the authors' "
            "kernel, in the native kernel alone, and where a text is read whole and long enough for that to pay.",
            "Behind a narrower mask, as a window, a query chooses among the blocks of which it sees every key.",
            "Layers with full attention, as the paper's last ones in fine-tuning, are left out by `.on(layers=...)`.",
        ),
    )
    one_text = True
    block: PositiveInt = 512  # keys a block; the paper's scaling laws: 512
    # blocks that a query sees, its own among them; the paper's scaling laws: 3
    blocks: PositiveInt = 3

    @classmethod
    def example(cls) -> MoBA:
        return cls(4, 2)

    def declares(self, tokens: int) -> dict[str, float]:
        past = [min(i // self.block, self.blocks - 1) * self.block for i in range(tokens)]
        return {"density": sum(p + i % self.block + 1 for i, p in enumerate(past)) / tokens**2}

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def route(self, mask: Mask, call: Call) -> Mask:
        if call.query is None or call.key is None:
            return mask
        query, key = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (call.query, call.key))
        heads, place = call.heads, call.k_pos
        live = place >= 0 if call.keys.is_filled is None else call.keys.is_filled & (place >= 0)
        number = (place // self.block).clamp(min=0)  # [b|1 g|1 k]
        means, held = (spread_heads(x, heads) for x in _means(key, number, live))
        own = spread_heads(call.q_pos // self.block, heads)[..., None]  # [b|1 h|1 q 1]
        blocks = torch.arange(means.shape[2], device=key.device)

        def seen(rows: slice) -> Tensor:
            """How many keys of each block a query sees, `[b h r m]`."""
            keep = mask.keeps(call.tile(rows, slice(0, key.shape[2])).pairs)
            here = spread_heads(live, heads)[..., None, :]
            here = here if keep is None else both(*torch.broadcast_tensors(keep, here))
            here, where = torch.broadcast_tensors(here, spread_heads(number, heads)[..., None, :])
            return here.new_zeros(*here.shape[:3], means.shape[2], dtype=torch.int).scatter_add(-1, where, here.int())

        def pick(rows: slice) -> Tensor:
            gate = query[:, :, rows] @ means.mT  # [b h r m]
            past = held[:, :, None] & (blocks < own[:, :, rows])
            if not mask.plain:  # of which the query sees every key, whether the others are held or gone
                past = both(past, seen(rows) == self.block)
            best = gate.masked_fill(~past, -torch.inf).topk(min(self.blocks - 1, means.shape[2])).indices
            chosen = both(torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True), past)
            return either(chosen, blocks == own[:, :, rows])

        def laid(chosen: Tensor, cols: slice | Tensor) -> Tensor:
            return chosen.gather(-1, spread_heads(number, heads)[:, :, None, cols].expand(*chosen.shape[:3], -1))

        each = blocks.expand(*number.shape[:2], -1).contiguous()
        ends = [
            spread_heads(torch.searchsorted(number.contiguous(), each, right=behind), heads) for behind in (False, True)
        ]

        def stretches(chosen: Tensor) -> Tensor:
            best = chosen.int().topk(min(self.blocks, chosen.shape[-1])).indices
            there = chosen.gather(-1, best)
            return torch.stack([x[:, :, None].expand_as(chosen).gather(-1, best) * there for x in ends], -1)

        whole = call.keys.whole and call.keys.first == 0 and call.queries.alike(call.keys)
        gather = (lambda: by_block(pick(slice(None)), self.block)) if whole and mask.causal else None
        return mask & Chosen(pick, laid, None if call.keys.packed else stretches, gather=gather)


def _means(key: Tensor, number: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each block's live keys `[b g m d]`, and which blocks have some, from keys `[b g k d]` and blocks."""
    number, live = (x.expand(key.shape[:3])[..., None] for x in (number, live))
    sums = key.new_zeros(*key.shape[:2], int(number.max()) + 1, key.shape[3])
    counts = sums[..., :1].scatter_add(2, number, live.to(key.dtype))
    return sums.scatter_add(2, number.expand(key.shape), key * live) / counts.clamp(min=1), counts[..., 0] > 0


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, MoBA(32, 3)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
