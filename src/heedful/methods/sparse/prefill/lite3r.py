"""softmax over each query's highest scores, and beside it W times linear attention, W fitted to what that loses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu

from heedful.authoring import (
    Call,
    FieldError,
    FitContext,
    Fitted,
    Layer,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveShare,
    Site,
    SiteError,
    at,
    reads,
)
from heedful.core.stats import Sum
from heedful.kit.batches import at_least_one, read
from heedful.kit.running import CHUNK, Running, divided, wide

DAMPING = 1.0  # times the mean square of a feature, added, since features of all tokens are much alike


class Lite3R(Method):
    """Few keys exactly, all of them by features and one small map a layer; the rest of a model stays as it is.

    `fit` finds the maps from a few inputs; they may be trained on, and alone, with the model frozen.
    """

    paper = Paper(
        "P325",
        "Lite3R: A Model-Agnostic Framework for Efficient Feed-Forward 3D Reconstruction",
        "Haoyu Zhang, Zeyu Zhang, Zedong Zhou, Yang Zhao, Hao Tang",
        2026,
        "2605.11354",
        differs=(
            "Attention alone: training that rounds to 8-bit floats, the paper's other half, is not here.",
            "`fit` solves for each layer's map in closed form, so that heads come near the model's own; the authors "
            "train it by the task's loss and the distance of what whole layers give.",
            "As in the authors' code keys are chosen one by one and features are ELU + 1, over all keys; the paper "
            "speaks of blocks, and one way through the code has these.",
            "In causal models features are summed over the keys so far, behind a narrower mask over those that a query "
            "sees, and a share is one of the keys that are seen.",
            "Scores are computed to be ranked; what fewer of them would save is not saved here.",
        ),
    )
    one_text = True
    subjects = ("text", "image")
    share: PositiveShare = 0.3  # of its keys that a query's softmax sees; the authors: 0.3
    start: NonNegativeFloat = 1e-3  # standard deviation of maps without a fit; the authors: 0.001
    maps: Fitted | None = None  # "map.LAYER" [d d]

    @classmethod
    def neutral(cls) -> Lite3R:
        return cls(1.0, 0.0)

    @classmethod
    def example(cls) -> Lite3R:
        return cls(0.3, 0.5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        size = (layer.value_dim, layer.value_dim)
        if self.maps is None:
            random = torch.Generator().manual_seed(layer.number)
            return {"map": self.start * torch.randn(size, generator=random)}
        found = self.maps.get(f"map.{layer.number}")
        if found is None or found.shape != size:
            rule = f"was fitted to another model: layer {layer.number} wants a map of {list(size)}"
            raise FieldError(self, "maps", self.maps, rule, "heedful.fit(Lite3R(), model, batches)")
        return {"map": found.clone()}

    @at(Site.SCORES)
    def narrow(self, scores: Tensor, call: Call) -> Tensor:
        return scores.masked_fill(~highest(scores, call, self.share), -torch.inf)

    @at(Site.HEAD_OUTPUT)
    def add_linear(self, heads: Tensor, call: Call) -> Tensor:
        found = linear(call)
        return heads + (found @ call.params["map"].to(found.dtype).mT).to(heads.dtype)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Lite3R:
        maps = {}
        for layer, both in read(context, _Lost(self.share), at_least_one(self, batches)).items():
            gram, cross = both.value.chunk(2, -1)
            ridge = DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            maps[f"map.{layer}"] = torch.linalg.solve(gram + ridge, cross).mT.float()
        return replace(self, maps=Fitted(maps))


class _Lost(Method):
    """Products of linear attention `x` with itself and with what few keys lose of each head: `[x^T x, x^T lost]`."""

    whole_map = True
    share: float

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Sum:
        x = linear(call)
        if call.value is None:
            raise SiteError(f"layer {call.layer}: values are not known")
        few = weights.masked_fill(~highest(weights, call, self.share), 0.0)
        lost = weights - few / few.sum(-1, keepdim=True).clamp(min=torch.finfo(few.dtype).tiny)
        lost = lost @ call.spread(call.value[:, :, call.cols]).to(lost.dtype)
        x = x.double() * call.is_text[..., None]
        return Sum.of(torch.einsum("bhnd,bhne->de", x, torch.cat([x, lost.double()], -1)))


def highest(scores: Tensor, call: Call, share: float) -> Tensor:
    """Which keys are the highest share of those that each query sees, one at least, `[b h r k]`."""
    seen = torch.ones_like(scores, dtype=torch.bool) if call.keep is None else call.keep.expand_as(scores)
    count = (share * seen.sum(-1, keepdim=True)).long().clamp(min=1)
    order = scores.masked_fill(~seen, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return (order.argsort(dim=-1) < count) & seen


def linear(call: Call) -> Tensor:
    """Each head's means of values by products of features, `[b h n d]`."""
    if call.query is None or call.key is None or call.value is None:
        raise SiteError(f"layer {call.layer}: queries, keys and values are known from MASK on")
    q, k, v = wide(call.query, call.key, call.value)
    if not call.mask.plain:
        return _of_pairs(call, q, call.spread(k), call.spread(v))
    running = Running(call, k)
    value = running.cut(v)
    values = torch.cat([value, running.ones(value)], -1)
    return divided(running.mixed("products", elu(q) + 1, running.hide(elu(running.cut(k)) + 1), values))


def _of_pairs(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same over the keys that a narrower mask leaves each query, a few rows at a time."""
    q, k = elu(q) + 1, elu(k) + 1
    values, out = torch.cat([v, torch.ones_like(v[..., :1])], -1), []
    for start in range(0, q.shape[2], CHUNK):
        tile = call.tile(slice(start, min(start + CHUNK, q.shape[2])), slice(0, k.shape[2]))
        weights = q[:, :, tile.rows] @ k.mT
        keep = call.mask.keeps(tile.pairs)
        out.append((weights if keep is None else weights.masked_fill(~keep, 0.0)) @ values)
    return divided(torch.cat(out, 2))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    calm = tokenizer("The sea is calm. Rain falls on the hills, and a bell rings. " * 4, return_tensors="pt")
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    for method in (Lite3R(0.1, 0.0), fit(Lite3R(0.1), model, [calm])):
        with torch.no_grad(), attach(model, method) as run:
            print(run(**text, labels=text["input_ids"]).loss.item())
