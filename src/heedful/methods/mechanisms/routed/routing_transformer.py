"""softmax over keys that share a cluster with the query: each cluster takes the w tokens nearest to its moving mean."""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, one_hot

from heedful.authoring import (
    Call,
    Layer,
    Mask,
    Method,
    Paper,
    PositiveInt,
    ShareBelowOne,
    Site,
    SiteError,
    at,
)
from heedful.core.flags import apart, meets
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Reached, meeting
from heedful.kit.running import past_keys, text_keys
from heedful.kit.told import of_keys
from heedful.kit.topk import top_k

WORD = 8  # bits of a whole number of a byte, which is compared fastest


class RoutingTransformer(Method):
    """Queries and keys of one length are clustered as training goes on, and meet within clusters. For models trained
    with it; the authors' have local heads beside: `RoutingTransformer().on(heads=[4, 5, 6, 7])`.
    """

    paper = Paper(
        "P129",
        "Efficient Content-Based Sparse Attention with Routing Transformers",
        "Aurko Roy, Mohammad Saffar, Ashish Vaswani, David Grangier",
        2021,
        "2003.05997",
        "TACL 2021",
        differs=(
            "Queries and keys are unlike, as in the authors' encoders; in their decoders keys are the queries.",
            "A token that several clusters take sees the members of all in one softmax, where the authors take a "
            "mean of several.",
            "Clusters take tokens out of a whole text, which tells earlier tokens of later ones, as in the authors' "
            "training. New tokens choose anew among all so far; a query that was read without it is in no cluster.",
            "Scores have the model's factor; in the authors' code the levelling of queries takes theirs away again.",
            "Means begin with a count of one each, where the authors count from zero, and move in each call of a "
            "module that trains, after it has chosen by them: once by queries and keys together, where the authors' "
            "encoders move them by queries and then by keys. There is no commitment loss.",
        ),
    )
    one_text = True
    subjects = ("text", "image")
    causal = False
    chunk_invariant = False
    clusters: PositiveInt = 16  # of a head; a text's tokens to each are what a cluster takes
    decay: ShareBelowOne = 0.999  # of the means, in each call of training; the authors' code: 0.999

    @classmethod
    def example(cls) -> RoutingTransformer:
        return cls(3)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        means = torch.randn(layer.heads, self.clusters, layer.head_dim, generator=random)
        moving = {"sums": _even(means), "counts": torch.ones(layer.heads, self.clusters)}
        return {name: nn.Parameter(start, requires_grad=False) for name, start in moving.items()}

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.QUERY)
    def level(self, query: Tensor, call: Call) -> Tensor:
        return _even(query)

    @at(Site.KEY)
    def level_keys(self, key: Tensor, call: Call) -> Tensor:
        return _even(key)

    @at(Site.MASK)
    def route(self, mask: Mask, call: Call) -> Mask:
        if call.query is None or call.key is None:
            raise SiteError(f"{self!r}, layer {call.layer}: queries and keys that route are known from MASK on")
        total, n = len(call.keys), len(call.queries)
        text = text_keys(call, total)
        text = torch.ones(1, 1, total, dtype=torch.bool) if text is None else spread_heads(text, call.heads)
        text = text.to(call.key.device)[:, :, None]  # [b|1 h|1 1 k]
        size = (text.sum(-1, keepdim=True) // self.clusters).clamp(min=1)
        means = (call.params["sums"] / call.params["counts"][..., None]).detach()  # [h c d]
        query, key = call.query.detach().to(means.dtype), call.spread(call.key.detach()).to(means.dtype)
        asked, held = of_keys(call, "queries", query @ means.mT).mT, (key @ means.mT).mT  # [b h c k]
        start = past_keys(call, n, total)
        asking = _nearest(asked, size, text & asked.isfinite())[..., start : start + n]
        giving = _nearest(held, size, text)
        if call.training:
            self._move(call, torch.cat([query, key], 2), torch.cat([text[..., start : start + n], text], -1))

        codes = [(one[..., None], other[:, :, None]) for one, other in zip(_words(asking), _words(giving), strict=True)]
        before = _words(torch.ones(self.clusters, self.clusters, device=giving.device).tril(-1).T[None, None])

        def meet(rows: slice, cols: slice | Tensor) -> Tensor:
            return meets(*((one[:, :, rows], other[..., cols]) for one, other in codes))

        def alone(rows: Tensor, cols: Tensor, those: slice) -> Tensor:
            met = []
            for (one, other), earlier in zip(codes, before, strict=True):
                asked = one.mT.expand(*rows.shape[:3], -1).gather(-1, rows) & earlier[:, :, those, None]
                met.append((asked[..., None], other.expand(*cols.shape[:3], -1).gather(-1, cols)[..., None, :]))
            return apart(*met)

        taken = giving.flatten(0, 2).any(0)  # rows of a tile are of all clusters, mostly
        return mask & Reached(meet, lambda rows: taken, gather=lambda: meeting(asking, giving, alone))

    @torch.no_grad()
    def _move(self, call: Call, x: Tensor, text: Tensor) -> None:
        """Each mean goes a little towards those of `x [b h n d]` that are nearest to it, where there is text."""
        sums, counts = call.params["sums"], call.params["counts"]
        nearest = one_hot((x @ (sums / counts[..., None]).mT).argmax(-1), self.clusters).to(x.dtype) * text.mT
        counts.lerp_(nearest.sum((0, 2)), 1 - self.decay)
        sums.lerp_((nearest.mT @ x).sum(0), 1 - self.decay)


def _nearest(near: Tensor, size: Tensor, text: Tensor) -> Tensor:
    """The tokens that each cluster takes, by how near they are `[b h c n]`: as many of its text as `size` says."""
    return top_k(near, int(size.flatten()[0]), None) if bool(text.all()) else top_k(near, size, text)


def _words(clusters: Tensor) -> list[Tensor]:
    """Which clusters `[b h c n]` have taken each token, as the bits of whole numbers `[b h n]`."""
    bits = [x << i % WORD for i, x in enumerate(clusters.byte().unbind(2))]
    return [reduce(or_, bits[i : i + WORD]) for i in range(0, len(bits), WORD)]


def _even(x: Tensor) -> Tensor:
    """With a mean of 0 and a variance of 1 over channels."""
    return layer_norm(x, x.shape[-1:])


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, RoutingTransformer(3)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
