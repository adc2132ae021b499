"""z = mu + sigma eps on each head; loss + beta sum log(1 + mu^2 / sigma^2) / 2; noisy heads, sigma^2 >> mu^2, go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt
from heedful.core.sites import Site, at, penalises
from heedful.kit.batches import at_least_one
from heedful.kit.labels import labelled, loss_of
from heedful.methods.compress.prune._pruner import HeadPruner

TINY = 1e-8  # beside a variance, or a squared mean, that may be 0

PAPER = Paper(
    "P231",
    "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning",
    "Oshin Dutta, Ritvik Gupta, Sumeet Agarwal",
    2024,
    "2406.05276",
    differs=(
        "Masks on heads alone; the paper has them on embeddings, hidden units and layers too.",
        "Masks alone are trained, as in Faster-VTrans, and by the model's own loss; nothing is distilled.",
        "A share of the heads is dropped once masks are trained; the authors steer the sparsity to a budget meanwhile.",
        "Query heads that share a key head have one mask and go together; with a key head each, this is the paper's.",
        "The paper's text was not at hand, and its code in part: rate, passes and beta are ours.",
    ),
)


class _Masks(Method):
    """A Gaussian factor on each group of heads, drawn for each text, and what it may tell of them."""

    paper = PAPER
    beta: float = 1.0
    seed: int = 0

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(self.seed * 4099 + layer.number)
        near = 0.01 * torch.randn(2, layer.kv_heads, generator=draw)
        return {"mean": 1 + near[0], "log_variance": near[1] - 9}

    @at(Site.HEAD_OUTPUT)
    def mask(self, heads: Tensor, call: Call) -> Tensor:
        mean, log_variance = call.params["mean"], call.params["log_variance"]
        draw = torch.Generator().manual_seed((self.seed * 4099 + call.forward) * 4099 + call.layer)
        noise = torch.randn(len(heads), len(mean), generator=draw).to(heads)
        z = mean + (log_variance / 2).exp() * noise
        return heads * z.repeat_interleave(call.heads // call.kv_heads, 1)[..., None, None]

    @penalises(Site.HEAD_OUTPUT)
    def told(self, heads: Tensor, call: Call) -> Tensor:
        variance = call.params["log_variance"].exp() + TINY
        return self.beta / 2 * (1 + call.params["mean"].square() / variance).log().sum()


class VTrans(HeadPruner):
    """Takes out the heads through which least needs to pass for the model's loss, as noise on them tells.

    `fit` takes batches that give the model a loss, as those of PruneHeads. What stays is scaled by its mean mask.
    """

    paper = PAPER
    epochs: PositiveInt = 10  # passes over the batches
    rate: PositiveFloat = 0.05  # Adam's, of means and log variances
    beta: PositiveFloat = 1e-3  # weight of what passes, in nats, beside the model's loss
    seed: int = 0
    means: Fitted | None = None  # "LAYER" [g]

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> VTrans:
        shown = [labelled(batch) for batch in at_least_one(self, batches, {"labels": "..."})]
        with context.attach(_Masks(self.beta, self.seed)) as run, torch.enable_grad():
            learns = run.parameters()
            optimiser = torch.optim.Adam(learns, lr=self.rate)
            for _ in range(self.epochs):
                for inputs in shown:
                    optimiser.zero_grad()
                    loss_of(self, run, inputs).backward()
                    optimiser.step()
            found = {name: x.detach().double().cpu() for name, x in run.state_dict().items()}
        importance, means = {}, {}
        for layer in context.layers:
            mean = found[f"0.{layer.number}.mean"]
            noise = found[f"0.{layer.number}.log_variance"]
            importance[str(layer.number)] = (mean.square() + TINY).log() - noise
            means[str(layer.number)] = mean
        return replace(self, importance=Fitted(importance), means=Fitted(means))

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        mean = None if self.means is None or not self.share else self.means.get(str(layer.number))
        if mean is None or len(mean) != layer.kv_heads:
            return super().operate(weights, layer)
        factor = mean.to(weights.o).repeat_interleave(layer.heads // layer.kv_heads)
        return super().operate(replace(weights, o=weights.o * factor[None, :, None]), layer)


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    smaller = operate(model, fit(VTrans(0.2), model, [dict(text)]))
    for name, m in (("whole", model), ("pruned", smaller)):
        print(name, m.num_parameters(), m(**text, labels=text["input_ids"]).loss.item())
