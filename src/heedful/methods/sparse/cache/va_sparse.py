"""a_i^2 + lambda softmax_i(sum over image k of a_ik): entries stay that are looked at, or look at the image."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName
from heedful.core.regions import by_text, marked
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget, added_up
from heedful.kit.scored_cache import ScoredCache
from heedful.kit.scores import entry_weights, last_weights

ROWS = 256  # queries at a time, so that no map of a whole prompt is ever held


class VASparse(ScoredCache):
    """Drops what the newest token attends to least, and spares tokens of an image and those that looked at it.

    Where the image stands is the role `role`.
    """

    paper = Paper(
        "P287",
        "VASparse: Towards Efficient Visual Hallucination Mitigation via Visual-Aware Token Sparsification",
        "Xianwei Zhuang, Zhihong Zhu, Yuxin Xie, Liming Liang, Yuexian Zou",
        2025,
        "2501.06553",
        "CVPR 2025",
        differs=(
            "The score is the paper's, as another's summary gives it, weights averaged over heads. In the authors' "
            "code saliency is 1 for all, and what is squared is the mean over the prompt's queries.",
            "Saliency is of the same layer, where the summary has that of the layer before.",
            "All entries compete, text too; the authors' code drops those of the image alone.",
            "The contrast with what little is seen, in the authors' code a tenth of what the last token's embedding "
            "says by itself, and the penalty on text at which heads stare, are not here.",
            "Weights are computed anew from queries and keys: they know of causality, padding, a soft cap and a bias, "
            "and not of narrower masks, learned sinks and other methods' edits of the map.",
        ),
    )
    budget: Budget = 0.5  # share of the text, or entries a head; the authors' code: half of the image's
    saliency: NonNegativeFloat = 1.0  # lambda; the authors' code: 1
    role: RoleName = "image"  # the spans that stand for the image

    @at(Site.CACHE)
    def omit(self, entries: CachedKV, call: Call) -> Tensor:
        shape = entries.key.shape[:3]
        given = last_weights(entries, call, 1)[0].mean((1, 2))[:, None]
        looked = added_up("looked", self.looks(entries, call).expand(shape), entries, call)
        salient = looked.masked_fill(~entries.is_text, -torch.inf).softmax(-1)
        return self.best(given**2 + self.saliency * salient, entries, call)

    def looks(self, entries: CachedKV, call: Call) -> Tensor:
        """What this call's tokens gave to the image `[b 1 k]`, heads averaged; 0 for entries of earlier calls."""
        image = call.spread(by_text(marked, call.regions(self.role), entries.positions.position))[:, :, None]
        query = cast(Tensor, call.query)
        found, n = [], query.shape[2]
        for start in range(0, n, ROWS):
            rows = slice(start, min(start + ROWS, n))
            weights = entry_weights(entries, call, query[:, :, rows], rows, call.q_pos[:, :1, rows])
            found.append((weights * image).sum(-1).mean(1))
        new = torch.cat(found, 1)[:, None]
        return pad(new, (entries.key.shape[2] - n, 0))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The code is Berlin. " + "The sea is calm. " * 20 + "The code is", return_tensors="pt")
    with attach(model, VASparse(0.25), roles={"image": ((0, 5),)}) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=10, do_sample=False)[0, -10:]))
        print(run.activity())
