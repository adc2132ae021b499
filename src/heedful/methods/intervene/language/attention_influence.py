"""Scores of chosen heads <- 0, so that all they see weighs alike; a text's influence is (masked loss - loss) / loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.sites import Site, at
from heedful.core.stats import Statistic
from heedful.core.summary import Summary, sums
from heedful.kit.batches import Batch, read, with_roles
from heedful.kit.head_search import Head, heads_here, of_text
from heedful.kit.pointing import pointing


class AttentionInfluence(Method):
    """A model whose heads that fetch from context look everywhere alike: which texts does it read worse?

    Acts in every head until `fit` has chosen some. A fit takes batches of "input_ids" with "roles" whose "answer"
    repeats a "needle"; `influence` scores texts by the logits of the plain model and of this one.
    """

    paper = Paper(
        "P022",
        "AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection",
        "Kai Hua, Steven Wu, Ge Zhang, Ke Shen",
        2025,
        "2505.07293",
        "arXiv",
        differs=(
            "The copying that heads are found by is whatever the batches hold; the authors ask three-shot for answers "
            "under random keys.",
            "A head's retrieval score counts how often it looks most at the needle's token that comes next, the answer "
            "being given; the authors' model writes it, and each token of the needle counts once that it wrote where "
            "the head looked at it most.",
            "What a learned sink logit takes of a row stays what it is.",
            "What is chosen by the scores, and training on it, is left to the user.",
        ),
    )
    share: PositiveShare = 0.05  # of all heads that a fit takes, the best; the paper: 0.05
    heads: tuple[Head, ...] | None = None  # (layer, head) pairs that a fit chose; None: every head

    def idle(self, call: Call) -> bool:
        return call.cross or (self.heads is not None and not heads_here(self, self.heads, call))

    @at(Site.SCORES)
    def level(self, scores: Tensor, call: Call) -> Tensor:
        if self.heads is None:
            return torch.zeros_like(scores)
        chosen = torch.zeros(call.heads, dtype=torch.bool, device=scores.device)
        chosen[heads_here(self, self.heads, call)] = True
        return scores.masked_fill(chosen[:, None, None], 0.0)

    def fit(self, context: FitContext, batches: Iterable[Batch]) -> AttentionInfluence:
        """Choose the heads that most often look at what a copy has to give next."""
        good = [{"input_ids": "...", "roles": {"needle": ((4, 9),), "answer": ((20, 25),)}}]
        found = with_roles(self, batches, "needle", "answer", good=good)
        scores: dict[Head, float] = read(context, _Pointing(), found)
        count = max(1, round(self.share * len(scores)))
        best = sorted(scores, key=lambda head: (-scores[head], head))[:count]
        return replace(self, heads=tuple(sorted(best)))

    @staticmethod
    def influence(plain: Tensor, masked: Tensor, inputs: Batch) -> Tensor:
        """How much the loss on each text rises, as a share of it, by logits `[b n v]` without and with the masking."""
        loss, without = of_text(plain.float(), inputs), of_text(masked.float(), inputs)
        return without / loss - 1  # both are losses but for the sign


class _Pointing(Method):
    """How often each head points at the needle token that comes next."""

    def idle(self, call: Call) -> bool:
        return call.cross

    @sums("place")
    def point(self, pattern: Summary, call: Call) -> Statistic | None:
        return pointing(pattern, call)

    def answer(self, readings: Readings) -> dict[Head, float]:
        rows = {layer: statistic.value.tolist() for layer, statistic in readings.items()}
        return {(layer, h): x for layer, row in rows.items() for h, x in enumerate(row)}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    again = torch.randint(1000, 9000, (4, 24), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    copies = {"input_ids": again, "roles": {"needle": ((0, 24),), "answer": ((24, 48),)}}
    method = fit(AttentionInfluence(), model, [copies])
    for text in ("The key of Ada is 5281. The key of Bo is 7730. Ada's key, 5281, fits.", "Two cats sat on a mat."):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad(), attach(model, method) as run:
            print(text, float(method.influence(model(**inputs).logits, run(**inputs).logits, inputs)))
