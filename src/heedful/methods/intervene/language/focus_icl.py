"""sum_i s_i softmax([D_i; Q]) / sum s_i, s_i = sum exp: Q's scores + log T; the lowest of a row's D are left out."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, RoleName, ShareBelowOne
from heedful.core.regions import Region, by_text, span_of
from heedful.core.sites import Site, at


class FocusICL(Method):
    """Many demonstrations without the question losing the attention: the role marks them, all else is the question.

    Demonstrations stand in batches that do not see each other. A later token attends to each batch and the question
    by itself, and the T outcomes are added up by their sums of exponentials; that is one softmax in which what is no
    demonstration counts T times. Of the demonstrations' tokens it leaves out those that score lowest.
    """

    paper = Paper(
        "P138",
        "Focused Large Language Models are Stable Many-Shot Learners",
        "Peiwen Yuan, Shaoxiong Feng, Yiwei Li, Xinglin Wang, Yueqi Zhang, Chuyi Tan, Boyuan Pan, Heda Wang, Yao Hu, "
        "Kan Li",
        2024,
        "2408.13987",
        "EMNLP 2024",
        differs=(
            "Neither the paper's whole text nor the authors' code was at hand: that batches are joined by their sums "
            "of exponentials, and that tokens are left out of all batches together, is our reading of summaries.",
            "Demonstrations keep their places in the prompt.",
            "Share and size are fields; the authors choose them by the perplexity of demonstrations.",
        ),
    )
    drop: ShareBelowOne = 0.1  # share of the demonstrations' tokens that each later token leaves out, rounded down
    size: PositiveInt = 8  # demonstrations in a batch
    role: RoleName = "demonstrations"  # the spans of the demonstrations, in their order

    @classmethod
    def neutral(cls) -> FocusICL:
        return cls(0.0, 1 << 30)

    @classmethod
    def example(cls) -> FocusICL:
        return cls(0.5, 1)

    def idle(self, call: Call) -> bool:
        if call.cross or self.drop:
            return call.cross
        return all(len(spans) <= self.size for spans in call.regions(self.role))  # one batch: nothing to part

    @at(Site.MASK)
    def part(self, mask: Mask, call: Call) -> Mask:
        def sees(query: Tensor, key: Tensor) -> Tensor:
            mine, theirs = self._batch(call, query), self._batch(call, key)
            return (mine < 0) | (theirs < 0) | (mine == theirs)

        return mask & Where(sees)

    @at(Site.SCORES)
    def focus(self, scores: Tensor, call: Call) -> Tensor:
        pairs = call.pairs
        shown = self._batch(call, pairs.k) >= 0  # [b|1 h|1 1 k]
        asks = self._batch(call, pairs.q) < 0  # [b|1 h|1 r 1]
        begun = by_text(self._begun, call.regions(self.role), pairs.q).clamp(min=1)
        scores = scores + (begun.double().log() * (asks & ~shown)).to(scores.dtype)
        seen = (asks & shown).expand(scores.shape)
        if call.keep is not None:
            seen = seen & call.keep
        out = (self.drop * seen.sum(-1, keepdim=True)).floor()
        if not bool((out > 0).any()):
            return scores
        rank = scores.detach().masked_fill(~seen, torch.inf).argsort(-1).argsort(-1)
        return scores.masked_fill(seen & (rank < out), -torch.inf)

    def _begun(self, spans: Region, position: Tensor) -> Tensor:
        """How many batches of demonstrations begin at each position or before it."""
        starts = torch.tensor([start for start, _ in spans[:: self.size]], dtype=torch.long, device=position.device)
        return (position[..., None] >= starts).sum(-1)

    def _batch(self, call: Call, position: Tensor) -> Tensor:
        """Which batch of demonstrations each position belongs to; -1 where it is of the question."""
        return by_text(span_of, call.regions(self.role), position).div(self.size, rounding_mode="floor")


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    tokens: list[int] = []
    spans = []
    for word, label in (("apple", "fruit"), ("dog", "animal"), ("pear", "fruit"), ("horse", "animal")):
        piece = tokenizer(f"Word: {word}\nKind: {label}\n\n").input_ids
        spans.append((len(tokens), len(tokens) + len(piece)))
        tokens += piece
    ids = torch.tensor([tokens + tokenizer("Word: cherry\nKind:").input_ids])
    with attach(model, FocusICL(0.2, 2), roles={"demonstrations": tuple(spans)}) as run:
        print(tokenizer.decode(run.generate(ids, max_new_tokens=2, do_sample=False)[0, -2:]))
