"""Drop the key channels that weigh least: the lowest |Q_j| |K_j|, over a head's last queries and its cached keys."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call, Kept
from heedful.core.method import Method
from heedful.core.packed import Packing
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt, ShareBelowOne
from heedful.core.sites import Site, at
from heedful.kit.budget import between, grown
from heedful.kit.packing import Channels
from heedful.kit.scores import last_queries


class ThinK(Method):
    """Makes keys thinner: a share of a head's channels is dropped from all entries but the newest."""

    paper = Paper(
        "2407.21018",
        "ThinK: Thinner Key Cache by Query-Driven Pruning",
        "Yuhui Xu, Zhanming Jie, Hanze Dong, Lei Wang, Xudong Lu, Aojun Zhou, Amrita Saha, Caiming Xiong, Doyen Sahoo",
        2024,
        "2407.21018",
        "ICLR 2025",
        differs=(
            "Dropped channels come back as zeros for every call; the authors' code multiplies without them.",
            "The channels are chosen by the call with which a text outgrows the newest entries, from that call's last "
            "queries; the authors choose once, at the end of the prompt.",
            "What is generated loses the same channels as it leaves the newest entries; the authors leave it whole. "
            "What left them by tokens that are cropped again, such as guesses, stays thin.",
            "The heads of a group choose together; the authors' code keeps keys for each query head.",
            "The authors drop entries first: write SnapKV(...) | ThinK(...). Their variant for values is not here.",
        ),
    )
    chunk_invariant = False  # what is dropped after one call, the next cannot see
    share: ShareBelowOne = 0.4  # of a key head's channels that are dropped, rounded down; the authors' runs: 0.4
    recent: NonNegativeInt = 32  # newest entries that keep all channels; the authors' runs: 32
    window: PositiveInt = 32  # last queries that are asked; the authors: 32

    @classmethod
    def neutral(cls) -> ThinK:
        return cls(share=0.0)

    @classmethod
    def example(cls) -> ThinK:
        return cls(share=0.5, recent=2, window=2)

    def rests(self, tokens: int) -> str | None:
        short = tokens <= self.recent
        told = f"the newest {self.recent} tokens keep all channels, and the text has {tokens}: "
        return f"{told}recent={tokens // 2} would act" if short else None

    @at(Site.CACHE)
    def thin(self, entries: CachedKV, call: Call) -> Kept:
        if not int(self.share * entries.key.shape[-1]):
            return Kept()
        before, after = grown(call)
        dropped = call.state.cache.get("dropped", torch.zeros_like(entries.key[:, :, 0], dtype=torch.bool))
        chose = dropped.any(-1, keepdim=True)
        those = between(entries, chose * (before - self.recent), after - self.recent)  # others an earlier call thinned
        if not bool(chose.all()) and bool((new := those.any(-1, keepdim=True) & ~chose).any()):  # only now long enough
            dropped = call.state.cache["dropped"] = torch.where(new, self.least(entries, call), dropped)
        text, head, place = those.nonzero().T
        if not len(text):
            return Kept()
        rows = entries.key[text, head, place]
        used, slot = (text * call.kv_heads + head).unique(return_inverse=True)
        return Kept(key=Packing(those, Channels.of(rows, ~dropped.flatten(0, 1)[used], slot)))

    def least(self, entries: CachedKV, call: Call) -> Tensor:
        """Which channels of each key head weigh least, `[b g d]`."""
        queries, _, position = last_queries(call, self.window)
        asked = (queries.float() * (position >= 0)[..., None]).square().sum(2)
        held = (entries.key.float() * entries.is_text[..., None]).square().sum(2)
        weight = asked.unflatten(1, (call.kv_heads, -1)).sum(2) * held
        gone = weight.topk(int(self.share * weight.shape[-1]), largest=False).indices
        return torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, gone, True)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, ThinK(0.4)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
