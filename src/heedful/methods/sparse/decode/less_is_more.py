"""Some layers see all and rank tokens by min_h rank_h(q_h . k_h); the layers after see the best and the newest."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layers, Mask, Method, NonNegativeInt, Paper, Share, Site, SiteError, at
from heedful.core.positions import spread_heads
from heedful.kit.budget import Budget, all_fit, is_whole, room_for, rooms
from heedful.kit.chosen import Chosen

ROWS = 64  # queries that are ranked for at a time; memory only


class LessIsMore(Method):
    """One set of tokens for all heads and several layers, chosen anew for each query; the cache keeps all.

    The authors read the prompt in full: `LessIsMore().when("decode")`.
    """

    paper = Paper(
        "P128",
        "Less Is More: Training-Free Sparse Attention with Global Locality for Efficient Reasoning",
        "Lijie Yang, Zhihao Zhang, Arti Jain, Shijie Cao, Baihong Yuan, Yiwei Chen, Zhihao Jia, Ravi Netravali",
        2025,
        "2508.07101",
        differs=(
            "Without .when('decode') each query of a prompt chooses as a new token would; the authors' prompts see "
            "all.",
            "What a model adds to its scores does not count in the ranking.",
            "Tokens that a layer's narrower mask hides stay hidden there, and nothing takes their place.",
        ),
    )
    one_text = True
    budget: Budget = 2048  # tokens that a query sees; the paper: 1024 to 6144
    recent: Share = 0.25  # share of them that are the newest, sinks included; the paper: 0.25
    sinks: NonNegativeInt = 4  # first tokens that are always seen; the authors' runs: 4
    selecting: Layers = (2, 12)  # layers that see all and choose; the authors: 2, and 12 for Qwen3-8B

    @classmethod
    def neutral(cls) -> LessIsMore:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> LessIsMore:
        return cls(4, 0.5, 1, (0,))

    def rests(self, tokens: int) -> str | None:
        return all_fit(room_for(self.budget, tokens), tokens, "budget=0.5")

    def idle(self, call: Call) -> bool:
        return call.cross or is_whole(self.budget) or call.layer < min(self.selecting)

    @at(Site.MASK)
    def share(self, mask: Mask, call: Call) -> Mask:
        if call.query is None or call.key is None or not mask.causal:
            return mask
        if call.layer in self.selecting:
            starts = range(0, len(call.queries), ROWS)
            call.state.forward["seen"] = torch.cat([self._seen(mask, call, slice(i, i + ROWS)) for i in starts], 1)
            return mask
        seen = call.state.forward.get("seen")  # [b q n], by index: caches of other layers may have dropped others
        if seen is None or bool(seen.all()):
            return mask
        index, heads = call.keys.index.clamp(max=seen.shape[-1] - 1)[:, :, None], call.heads

        def pick(rows: slice) -> Tensor:
            mine = seen[:, None, rows].expand(-1, index.shape[1], -1, -1)
            return spread_heads(mine.gather(-1, index.expand(*mine.shape[:3], -1)), heads)

        return mask & Chosen(pick)

    def _seen(self, mask: Mask, call: Call, rows: slice) -> Tensor:
        """Which tokens some queries see in the layers to come, `[b r n]` by index."""
        part = call.tile(slice(rows.start, min(rows.stop, len(call.queries))), slice(0, len(call.keys)))
        scores = _by_index(_scores(part), mask, part)  # [b h r n]
        place = torch.arange(scores.shape[-1], device=scores.device) - (part.queries.index - part.q_pos)[:, 0, :, None]
        length = (part.q_pos[:, 0] + 1).clamp(min=1)  # [b|1 r]
        room = rooms(self.budget, length)
        middle = (room.double() * (1 - self.recent)).long()
        newest = room - middle
        sinks = torch.where(newest < self.sinks, 0, self.sinks)  # where they have no room, all of it is for the newest
        always = (place >= (length - newest + sinks)[..., None]) | (place < sinks[..., None])  # [b|1 r n]
        scores = scores.masked_fill(always[:, None], -torch.inf)
        most = min(int(middle.max()), scores.shape[-1])
        return _merged(scores, most, middle[..., None]) | always


def _scores(call: Call) -> Tensor:
    """What each query head gives each cached key, `[b h r k]`, but for the scale."""
    if call.query is None or call.key is None:
        raise SiteError(f"LessIsMore, layer {call.layer}: ranks tokens by queries and keys, and is handed none")
    query, key = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (call.query, call.key))
    grouped = query[:, :, call.rows].unflatten(1, (key.shape[1], -1)).flatten(2, 3) @ key.mT
    return grouped.view(len(query), call.heads, -1, key.shape[2])


def _by_index(scores: Tensor, mask: Mask, call: Call) -> Tensor:
    """The same, laid out by index; minus infinity for what a head does not hold or its query may not see."""
    keep = mask.keeps(call.pairs)
    scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    if call.keys.first == 0:
        return scores
    index = spread_heads(call.keys.index, call.heads)[:, :, None].expand(scores.shape)
    out = scores.new_full((*scores.shape[:-1], int(index.max()) + 1), -torch.inf)
    return out.scatter_reduce(-1, index, scores, "amax")  # an empty slot may bear any index


def _merged(scores: Tensor, most: int, room: Tensor) -> Tensor:
    """The first `room [b|1 r 1]` of all heads' first tokens, then all heads' second, and so on, as `[b r n]`."""
    b, h, r, n = scores.shape
    best = scores.topk(most)
    turn = torch.arange(most, device=scores.device) * h + torch.arange(h, device=scores.device)[:, None, None]
    turn = torch.where(best.values > -torch.inf, turn, n * h)  # [b h r m]
    first = turn.new_full((b, h, r, n), n * h).scatter(-1, best.indices, turn).amin(1)
    order = first.topk(most, largest=False)
    counted = (torch.arange(most, device=scores.device) < room) & (order.values < n * h)
    return torch.zeros_like(first, dtype=torch.bool).scatter(-1, order.indices, counted)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, LessIsMore(64, selecting=(2, 10)).when("decode")) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
