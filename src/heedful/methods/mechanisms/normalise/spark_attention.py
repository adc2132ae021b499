"""softmax(q1 k1) softplus(q2 k2) over keys of q1 k1 >= mean + deviation Q(1 - k/n), with Q a normal's quantiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus, threshold

from heedful.authoring import Call, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.flags import lowered
from heedful.kit.seen import how_many, only_seen


class SparkAttention(Method):
    """Half of a head's channels tells which keys count, without sorting; the others gate them. For models so trained.

    Some k keys are looked at where more are seen; how many is a guess from the scores' mean and deviation.
    """

    paper = Paper(
        "P292",
        "Spark Transformer: Reactivating Sparsity in FFN and Attention",
        "Chong You, Kan Wu, Zhipeng Jia, Lin Chen, Srinadh Bhojanapalli, Jiaxian Guo, Utku Evci, Jan Wassenberg, "
        "Praneeth Netrapalli, Jeremiah J. Willcock, Suvinay Subramanian, Felix Chern, Alek Andreev, Shreya Pathak, "
        "Felix X. Yu, Prateek Jain, David E. Culler, Henry Levy, Sanjiv Kumar",
        2025,
        "2506.06644",
        "NeurIPS 2025",
        differs=(
            "There is no code of the authors for attention; the formula is read from two summaries of the paper, and "
            "the deviation, which divides by n, from Gemma 3n in transformers, whose feed-forward parts have the same.",
            "The predictor has two of each four channels, and not the first half, so that in heads of a multiple of 8 "
            "channels the model's rotary embedding turns whole pairs of each part; the authors turn each part by "
            "itself.",
            "The highest score is kept where the threshold is above it, since a softmax of nothing is no number.",
            "A bias that a model adds to its scores is left out; both products are scaled and bounded as the "
            "model's one is.",
            "Attention alone, and not the feed-forward part.",
        ),
    )
    keep: PositiveInt = 256  # k, about how many keys a token looks at; the paper: 256

    @classmethod
    def example(cls) -> SparkAttention:
        return cls(4)

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        if call.query is None or call.key is None:
            raise SiteError(
                f"{self!r}, layer {call.layer}: queries and keys are not known, and scores are made of them"
            )
        q, k = call.query[:, :, call.rows].to(scores.dtype), call.spread(call.key[:, :, call.cols]).to(scores.dtype)
        tells, q = torch.arange(q.shape[-1], device=q.device) % 4 < 2, q * call.scale
        parts = (part.nonzero()[:, 0] for part in (tells, ~tells))
        predicted, gates = (call.capped(q.index_select(-1, part) @ k.index_select(-1, part).mT) for part in parts)
        if call.keep is not None:
            predicted = lowered(predicted, call.keep, into=True)
        # a row's softmax stays as it is where all move alike
        above = predicted - self._threshold(predicted.detach(), call)
        weights = threshold(above, -torch.finfo(above.dtype).tiny, torch.finfo(above.dtype).min).softmax(-1)
        return weights * softplus(gates)

    def _threshold(self, x: Tensor, call: Call) -> Tensor:
        """What about `keep` of the entries seen exceed if they are normally distributed, `[b h r 1]`."""
        n = how_many(call, x)
        mean = only_seen(x, call).sum(-1, keepdim=True) / n
        off = only_seen(x - mean, call, into=True)
        spread = torch.linalg.vector_norm(off, dim=-1, keepdim=True)
        quantile = torch.special.ndtri((1 - self.keep / n).clamp(min=0)) / n.sqrt()
        lowest = mean + spread * torch.where(n > self.keep, quantile, -2.0)  # of few all are farther up
        return lowest.minimum(x.amax(-1, keepdim=True))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    with attach(model, SparkAttention(4)) as run:
        print(run(**models.tiny_inputs(model)).logits.std(), run.activity())
