"""softmax(s + m) over the w visible keys of highest m, where m = exp(a softplus(W v)) is told by a key's value."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    Layer,
    Mask,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveInt,
    Site,
    SiteError,
    adds,
    at,
)
from heedful.core.flags import at_least, both, reaches, some, whole
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Chosen, Reached
from heedful.kit.topk import place_of, smallest


class DynamicMaskAttention(Method):
    """A key's value tells how much it counts: queries see those that count most; for models trained with it."""

    paper = Paper(
        "P143",
        "Trainable Dynamic Mask Sparse Attention",
        "Jingze Shi, Yifan Wu, Bingheng Wu, Yiran Peng, Liangdong Wang, Guang Liu, Yuyu Luo",
        2025,
        "2508.02124",
        differs=(
            "Of keys that count alike the newest are seen, where the authors leave it to chance: their a is 0 at the "
            "start, so that all count alike, and this begins as a sliding window.",
            "m has its exp, as in the paper and in the authors' models in transformers; their later code adds what "
            "stands in it, a softplus(W v): it chooses the same keys, and adds less to their scores.",
            "The norms of queries and keys in the authors' models are not part of it.",
            "Values of all key heads tell what counts for each of them, as in the authors' code, so it does not go on "
            "behind a cache whose heads hold unlike tokens.",
        ),
        also=(
            Paper(
                "P261",
                "Wonderful Matrices: Combining for a More Efficient and Effective Foundation Model Architecture",
                "Jingze Shi, Bingheng Wu",
                2024,
                "2412.11834",
                differs=(
                    "What is added to the scores is the same. The authors' code masks a share of a text's keys, if "
                    "told to; this does as that without a share where `keep` is a text's length or more.",
                    "Their layers of state-space duality and their experts are not part of it.",
                ),
            ),
        ),
    )
    keep: PositiveInt = 2048  # keys that a query sees; the authors' code: 2048
    start: float = 0.0  # a at the start; the authors' code: 0
    spread: NonNegativeFloat = 0.02  # standard deviation of W at the start; the authors' code: 0.02

    @classmethod
    def example(cls) -> DynamicMaskAttention:
        return cls(4, start=1.0, spread=0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        weight = torch.randn(layer.kv_heads, layer.kv_heads * layer.value_dim, generator=random)
        return {"weight": self.spread * weight, "rate": torch.full((layer.kv_heads,), self.start)}

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def choose(self, mask: Mask, call: Call) -> Mask:
        total = len(call.keys)
        if total <= self.keep:
            return mask
        newest_first = _counts(call, slice(None)).detach().flip(-1)  # a stable sort leaves the newest of equals first
        order = total - 1 - newest_first.argsort(dim=-1, descending=True, stable=True)
        order = spread_heads(order, call.heads).expand(-1, call.heads, -1)  # [b h k], since a mask may differ by head
        rank = order.argsort(-1)  # of each key
        seen = None if mask.blocks else mask.key_ranges(call.queries, call.keys, call.heads)
        if seen is not None and seen.shape[3] == 1:  # a query's keys are one range, as in a plain text
            start, stop = (x.expand(*rank.shape[:2], -1) for x in seen[..., 0, :].unbind(-1))
            most = smallest(rank, self.keep, start, stop).to(whole(total))[..., None]  # of a query's keys that it sees
            rank = rank.to(most.dtype)[:, :, None]
            return mask & Reached(
                lambda rows, cols: reaches(rank[..., cols], most[:, :, rows]),
                lambda rows: some(at_least(most[:, :, rows].amax(2, keepdim=True), rank).flatten(0, 2), 0),
            )
        order, rank = order[:, :, None], rank.to(whole(total))[:, :, None]

        def pick(rows: slice) -> Tensor:
            part = call.tile(rows, slice(0, total))
            keep = mask.keeps(part.pairs)
            if keep is None:
                return (rank < self.keep).expand(-1, -1, len(part.queries), -1)
            if int(keep.sum(-1).amax()) <= self.keep:
                return keep
            keep = keep.expand(*rank.shape[:2], -1, -1)
            by_rank = keep.gather(-1, order.expand(-1, -1, keep.shape[2], -1))
            last = place_of(by_rank, self.keep).to(rank.dtype)  # the rank of the last of its keys that a query sees
            return both(keep, at_least(last, rank))

        return mask & Chosen(pick)

    @adds
    def favour(self, call: Call) -> Tensor:
        return spread_heads(_counts(call, call.cols), call.heads)[:, :, None]


def _counts(call: Call, cols: slice | Tensor) -> Tensor:
    """How much these keys count, `[b g k]`."""
    if call.value is None:
        raise SiteError(f"DynamicMaskAttention, layer {call.layer}: keys are told by their values, and none are handed")
    held = (call.keys.index, call.keys.is_filled)  # by key head, or of all
    if any(x is not None and bool((x != x[:, :1]).any()) for x in held):
        rule = "heads hold unlike tokens, so their values cannot be put together; keep the cache whole"
        raise SiteError(f"DynamicMaskAttention, layer {call.layer}: {rule}")
    values = call.value[:, :, cols].transpose(1, 2).flatten(2)  # [b k gd]
    wide = torch.promote_types(values.dtype, torch.float32)
    weight, rate = (call.params[name].to(wide) for name in ("weight", "rate"))
    return torch.exp(rate * torch.nn.functional.softplus(values.to(wide) @ weight.mT)).mT


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, DynamicMaskAttention(4, start=0.5)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
