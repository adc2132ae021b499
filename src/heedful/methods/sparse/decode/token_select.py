"""Tokens by their votes sum_h softmax_j(<mean q_h, k_hj>): each chunk of queries sees the best, sinks and a window."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.kit.budget import Budget
from heedful.methods.sparse.decode._chunks import ChunkChoice, means


class TokenSelect(ChunkChoice):
    """Each chunk of queries, and each new token, sees the few tokens that its heads vote for; the cache keeps all."""

    paper = Paper(
        "P216",
        "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
        "Cache Selection",
        "Wei Wu, Zhuoshi Pan, Kun Fu, Chao Wang, Liyi Chen, Yunchu Bai, Tianfu Wang, Zheng Wang, Hui Xiong",
        2025,
        "2411.02886",
        "EMNLP 2025",
        differs=(
            "The Selection Cache, which takes the last choice again while queries stay alike, is not here: every chunk "
            "and every new token vote anew.",
            "Chunks begin at multiples of their size in the text, and a text that comes in one call is cut into them.",
            "With grouped heads a query head votes by the keys of its group; the authors' kernel deals key heads out "
            "in turn.",
            "As in the authors' code, scores are not scaled before the softmax.",
            "Votes and attention have queries and keys as the model turns them. In the authors' code keys vote "
            "unturned and queries turned by the window, and what is seen is then turned as if it stood in a row, which "
            "lets a model run past its trained length.",
            "For most of their tasks the authors take the highest vote among a few neighbours, as many as suit each.",
            "Votes know of causality and padding alone: tokens that a narrower mask hides may take others' room.",
        ),
    )
    one_text = True

    budget: Budget = 2688  # tokens seen, a share never fewer than sinks and window; the authors: 128 + 2048 + 512
    sinks: NonNegativeInt = 128  # first tokens that are always seen; the authors: 128
    window: int = 512  # newest tokens that are always seen, the chunk's included; the authors: 512
    chunk: PositiveInt = 512  # queries of a prompt that choose together; the paper: 512

    @classmethod
    def neutral(cls) -> TokenSelect:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> TokenSelect:
        return cls(budget=6, sinks=1, window=2, chunk=2)

    def best(self, query: Tensor, key: Tensor, call: Call, member: Tensor, always: Tensor, most: Tensor) -> Tensor:
        votes = self._votes(query, key, member, always)
        best = votes.topk(min(int(most.max()), votes.shape[-1])).indices
        counted = (torch.arange(best.shape[-1], device=best.device) < most).expand(best.shape)
        return torch.zeros_like(votes, dtype=torch.bool).scatter(-1, best, counted)

    @staticmethod
    def _votes(query: Tensor, key: Tensor, member: Tensor, always: Tensor) -> Tensor:
        """What all heads together give each token that is not seen anyway, `[b c k]`."""
        share = member / member.sum(-1, keepdim=True).clamp(min=1)
        mean = means(query, share)  # [b h c d]
        b, g, k, _ = key.shape
        scores = (mean.view(b, g, -1, mean.shape[-1]) @ key.detach().float().mT).view(b, -1, mean.shape[2], k)
        return scores.masked_fill(always, -torch.inf).softmax(-1).sum(1).masked_fill(always[:, 0], -1.0)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, TokenSelect(64, sinks=4, window=16, chunk=16)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
