"""A token's head i* = argmax softmax(R x) alone speaks, p_i* (o + W_2 gelu(W_1 o)); the heads least often chosen go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, one_hot

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer, Readings
from heedful.core.errors import FieldError, SiteError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum
from heedful.kit.feature_maps import drawn
from heedful.kit.labels import labelled, loss_of
from heedful.methods.compress.prune._pruner import HeadPruner

PAPER = Paper(
    "P037",
    "SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression",
    "Zeli Su, Ziyin Zhang, Wenzheng Zhang, Zhou Liu, Guixian Xu, Wentao Zhang",
    2025,
    "2512.20635",
    differs=(
        "Written from the abstract and the introduction: that a token's head is weighted by its share, and the form of "
        "the net behind it, are ours.",
        "The router and the net learn while the model stands still, and are there for the choice alone; the authors "
        "train all of it together and keep the net in place of the model's feed-forward part.",
        "Query heads that share a key head have one route and go together.",
        "Heads are counted in a last pass, over tokens of text, when the router has learned.",
        "Adam's rate and the passes are ours.",
    ),
)


class _Experts(Method):
    """Each token hears one group of heads, refined by a net that all groups share."""

    paper = PAPER
    units: int = 16  # of the shared net's inner layer
    seed: int = 0

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(1009 * self.seed + layer.number)
        d = layer.value_dim
        return {
            "router": drawn(random, layer.kv_heads, layer.width), "in": drawn(random, self.units, d),
            "out": torch.zeros(d, self.units),
        }  # fmt: skip

    @at(Site.HEAD_OUTPUT)
    def speak(self, heads: Tensor, call: Call) -> Tensor:
        p = {name: x.to(heads) for name, x in call.params.items()}
        shares = self.shares(call)
        speaks = shares * one_hot(shares.argmax(-1), shares.shape[-1])
        gate = speaks.mT.repeat_interleave(call.heads // call.kv_heads, 1)[..., None].to(heads)  # [b h n 1]
        return gate * (heads + linear(gelu(linear(heads, p["in"])), p["out"]))

    @reads(Site.HEAD_OUTPUT)
    def used(self, heads: Tensor, call: Call) -> Sum:
        chosen = one_hot(self.shares(call).argmax(-1), call.kv_heads)
        return Sum.of((chosen * call.is_text[:, 0, :, None]).sum((0, 1)).double())

    def shares(self, call: Call) -> Tensor:
        """Of each token's groups of heads, `[b n g]`."""
        if call.hidden is None:
            raise SiteError(f"SHRP, layer {call.layer}: the block is not handed hidden states to route by")
        router = call.params["router"]
        return linear(call.hidden.flatten(1, -2).to(router.dtype), router).softmax(-1)

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: stat.value for layer, stat in readings.items()}


class SHRP(HeadPruner):
    """Keeps the heads that tokens choose most often, where each may hear one; the others go.

    `fit` takes batches that give the model a loss, as those of PruneHeads: on these a router learns by that loss.
    """

    paper = PAPER
    units: PositiveInt = 16  # of the inner layer of the net that refines what a token's head says
    epochs: PositiveInt = 10  # passes over the batches while the router learns
    rate: PositiveFloat = 0.01  # Adam's
    seed: int = 0  # of the first router

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SHRP:
        shown, experts = [labelled(batch) for batch in batches], _Experts(self.units, self.seed)
        if not shown:
            raise FieldError(self, "batches", 0, "must be 1 or more", [{"labels": "..."}])
        with context.attach(experts) as run:
            optimiser = torch.optim.Adam(run.parameters(), lr=self.rate)
            with torch.enable_grad():
                for _ in range(self.epochs):
                    for inputs in shown:
                        optimiser.zero_grad()
                        loss_of(self, run, inputs).backward()
                        optimiser.step()
            run.reset()
            for inputs in shown:
                run(**inputs)
            counts = run[experts]
        return replace(self, importance=Fitted({str(layer): x / x.sum() for layer, x in counts.items()}))


if __name__ == "__main__":
    from heedful import fit, models, operate

    model = models.tiny("mha")
    batch = models.tiny_inputs(model)
    found = fit(SHRP(0.5, form="zeros"), model, [batch])
    print(found.importance, found.dropped())
    print(operate(model, found)(**batch, labels=batch["input_ids"]).loss.item())
