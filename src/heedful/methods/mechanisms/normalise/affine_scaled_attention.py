"""Weights a softmax(s) + (m - a) / n, a = clip(w . x / 10 + 1/2, 0, 1) of the layer's input x, m a's running mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import SiteError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import ShareBelowOne
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean
from heedful.kit.feature_maps import drawn
from heedful.kit.seen import how_many, only_seen


class AffineScaledAttention(Method):
    """A learned scale and a shift on each token's and head's weights, which need not add up to 1."""

    paper = Paper(
        "P014",
        "Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention",
        "Jeongin Bae, Baeseong Park, Gunho Park, Minsub Kim, Joonhyung Lee, Junhee Yoo, Sunghyeon Woo, Jiwon Ryu, "
        "Se Jung Kwon, Dongsoo Lee",
        2026,
        "2602.23057",
        differs=(
            "The shift is divided by how many keys a row sees, and not by the length of the text, since a token must "
            "not depend on how many follow.",
            "The running mean is each head's own, over text tokens, and is renewed before it is used; the paper does "
            "not say. It moves in calls through which gradients are taken (twice where gradient checkpointing "
            "computes a layer twice), and is kept with what is learned.",
            "The scale's weights are drawn as torch.nn.Linear draws them, of which the paper says nothing, by a "
            "generator seeded by the layer's number.",
        ),
    )
    momentum: ShareBelowOne = 0.9  # what is left of the running mean in each call of training; the paper's default

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        weight = drawn(random, layer.heads, layer.width)
        return {"weight": weight, "mean": nn.Parameter(torch.zeros(layer.heads), requires_grad=False)}

    @reads(Site.QUERY)
    def watch(self, query: Tensor, call: Call) -> Mean:
        """Each head's mean scale, which moves the running mean in training; before it is used, and once a call."""
        scale = self._scale(query, call)
        text = call.is_text.to(scale.dtype).expand(len(scale), 1, -1)
        found, tokens = (scale.detach() * text).sum((0, 2)), text.sum()
        if scale.requires_grad:
            kept = call.params["mean"]
            with torch.no_grad():
                kept.lerp_((found / tokens.clamp(min=1)).to(kept.dtype), 1 - self.momentum)
        return Mean.of(found, tokens)

    @at(Site.PATTERN)
    def scale(self, weights: Tensor, call: Call) -> Tensor:
        scale = self.scales(call)[..., None].to(weights.dtype)
        mean = call.params["mean"].detach().to(scale.dtype)[:, None, None]
        shift = (mean - scale) / how_many(call, weights)
        return only_seen(torch.addcmul(shift, scale, weights), call, into=True)

    def scales(self, call: Call) -> Tensor:
        """The scales of a tile's rows, `[b h r]`; rows of earlier calls, which are looked at alone, have zero."""
        if call.query is None:
            raise SiteError(f"{self!r}, layer {call.layer}: scales are those of a tile, from SCORES on")
        return torch.nn.functional.pad(self._scale(call.query, call), (call.earlier, 0))[..., call.rows]

    def _scale(self, query: Tensor, call: Call) -> Tensor:
        """The scale of every head and token of the call, `[b h q]`."""
        b, _, q, _ = query.shape
        if call.hidden is None or call.hidden.shape[:-1].numel() != b * q:
            raise SiteError(
                f"{self!r}, layer {call.layer}: the layer's input [b n e] is not known, and the scale needs it"
            )
        weight = call.params["weight"]
        return (0.1 * (call.hidden.reshape(b, q, -1).to(weight.dtype) @ weight.mT) + 0.5).clamp(0, 1).mT


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, AffineScaledAttention()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
