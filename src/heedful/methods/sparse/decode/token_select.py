"""Tokens by their votes sum_h softmax_j(<mean q_h, k_hj>): each chunk of queries sees the best, sinks and a window."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError, SiteError
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, all_fit, is_whole, require_budget, room_for, rooms
from heedful.kit.chosen import Chosen


class TokenSelect(Method):
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
            "Votes know of causality and padding alone: tokens that a narrower mask hides may take others' room.",
        ),
    )
    causal = False  # the last queries of a chunk have a say in what the first ones see
    chunk_invariant = False  # a new token votes alone, and in a prompt its chunk does
    budget: Budget = 2688  # tokens seen, a share never fewer than sinks and window; the authors: 128 + 2048 + 512
    sinks: int = 128  # first tokens that are always seen; the authors: 128
    window: int = 512  # newest tokens that are always seen, the chunk's included; the authors: 512
    chunk: int = 512  # queries of a prompt that choose together; the paper: 512

    def __post_init__(self) -> None:
        require_budget(self, self.budget)
        if self.sinks < 0:
            raise FieldError(self, "sinks", self.sinks, "must be 0 or more tokens", 128)
        if self.chunk < 1:
            raise FieldError(self, "chunk", self.chunk, "must be 1 or more queries", 512)
        if self.window < self.chunk:
            raise FieldError(
                self, "window", self.window, f"must hold the chunk of {self.chunk}, or it is not all seen", self.chunk
            )
        least = self.sinks + self.window
        if isinstance(self.budget, int) and self.budget < least:
            rule = f"must hold the {self.sinks} sinks and the window of {self.window}, which are always seen"
            raise FieldError(self, "budget", self.budget, rule, least)

    @classmethod
    def neutral(cls) -> TokenSelect:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> TokenSelect:
        return cls(budget=6, sinks=1, window=2, chunk=2)

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
            rule = "heads hold unlike tokens, so they cannot vote on them; keep the cache whole"
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
            always = always | ~call.keys.is_filled[:, :1, None]  # nobody sees these, whatever is voted
        if bool(always.all()):
            return mask
        votes = self._votes(call.query, call.key, member, always)
        most = (rooms(self.budget, end) - self.sinks - self.window).clamp(min=0)[..., None]  # [b|1 c 1]
        best = votes.topk(min(int(most.max()), votes.shape[-1])).indices
        counted = (torch.arange(best.shape[-1], device=best.device) < most).expand(best.shape)
        table = torch.zeros_like(votes, dtype=torch.bool).scatter(-1, best, counted) | always[:, 0]  # [b c k]
        if bool(table.all()):
            return mask
        text = torch.arange(len(table), device=table.device)[:, None]
        return mask & Chosen(lambda rows: table[text, number[:, rows]][:, None])

    @staticmethod
    def _votes(query: Tensor, key: Tensor, member: Tensor, always: Tensor) -> Tensor:
        """What all heads together give each token that is not seen anyway, `[b c k]`."""
        share = member / member.sum(-1, keepdim=True).clamp(min=1)
        mean = share[:, None].float() @ query.detach().float()  # [b h c d]
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
