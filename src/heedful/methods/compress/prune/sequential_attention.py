"""Heads times m: 1 where chosen, softmax(l) over the rest; l learns by the model's loss, then the highest is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.batches import at_least_one
from heedful.kit.labels import labelled, loss_of
from heedful.methods.compress.prune._pruner import HeadPruner

START = 1e-5  # the spread of new logits; the authors' code: 1e-5

PAPER = Paper(
    "P144",
    "Sequential Attention for Feature Selection",
    "Taisuke Yasuda, MohammadHossein Bateni, Lin Chen, Matthew Fahrbach, Gang Fu, Vahab Mirrokni",
    2023,
    "2209.14881",
    "ICLR 2023",
    differs=(
        "Heads of a trained model are chosen; the paper chooses features of a network's input.",
        "Logits alone are trained; the authors train the network along with them.",
        "There is no training before the first choice, which the authors' code gives a tenth of its steps.",
        "Query heads that share a key head have one logit and go together.",
        "Heads that are not chosen are ranked by the last weights, so that a share of each layer can be dropped too.",
        "Adam's rate and the passes for each choice are ours.",
    ),
)


class _Factors(Method):
    """A factor on each group of heads."""

    paper = PAPER

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"factor": torch.ones(layer.kv_heads)}

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * call.params["factor"].repeat_interleave(call.heads // call.kv_heads)[:, None, None]


class SequentialAttention(HeadPruner):
    """Chooses the heads that stay one by one, each by what it adds to those chosen before it; the others go.

    `fit` takes batches that give the model a loss, as those of PruneHeads, and chooses as many as `share` leaves.
    """

    paper = PAPER
    at_once: PositiveInt = 1  # groups that are chosen at each step; the paper: 1
    epochs: PositiveInt = 5  # passes over the batches before each choice
    rate: PositiveFloat = 0.05  # Adam's, of logits
    seed: int = 0  # of the first logits

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SequentialAttention:
        shown = [labelled(batch) for batch in at_least_one(self, batches, {"labels": "..."})]
        draw = torch.Generator().manual_seed(self.seed)
        with context.attach(_Factors()) as run, torch.enable_grad():
            factors = list(run.parameters())
            sizes = [len(factor) for factor in factors]
            total = sum(sizes)
            chosen = torch.zeros(total, dtype=torch.bool)
            rank = torch.zeros(total, dtype=torch.float64)
            stay = total - round(self.share * total)
            for done in range(0, stay, self.at_once):
                logits = (START * torch.randn(total, generator=draw)).requires_grad_()
                optimiser = torch.optim.Adam([logits], lr=self.rate)
                for _ in range(self.epochs):
                    for inputs in shown:
                        mask = weights(logits, chosen)
                        for factor, part in zip(factors, mask.detach().split(sizes), strict=True):
                            factor.data.copy_(part)
                            factor.grad = None
                        loss_of(self, run, inputs).backward()
                        optimiser.zero_grad()
                        mask.backward(torch.cat([_gradient(factor) for factor in factors]))
                        optimiser.step()
                left = weights(logits.detach(), chosen).masked_fill(chosen, -1.0)
                best = left.topk(min(self.at_once, stay - done)).indices
                rank = torch.where(chosen, rank, left.double())  # who is not chosen is worth less than 1
                rank[best] += stay - done
                chosen[best] = True
        found = {str(layer.number): x.clone() for layer, x in zip(context.layers, rank.split(sizes), strict=True)}
        return replace(self, importance=Fitted(found))


def weights(logits: Tensor, chosen: Tensor) -> Tensor:
    """What each is multiplied by: 1 where it is chosen, and a softmax over all others."""
    if bool(chosen.all()):
        return torch.ones_like(logits)
    return torch.where(chosen, 1.0, logits.masked_fill(chosen, -torch.inf).softmax(-1))


def _gradient(factor: Tensor) -> Tensor:
    """A factor's gradient, on the processor, where logits are; 0 where the loss does not depend on it."""
    return torch.zeros(len(factor)) if factor.grad is None else factor.grad.float().cpu()


if __name__ == "__main__":
    from heedful import fit, models, operate

    model = models.tiny("mha")
    batch = models.tiny_inputs(model)
    found = fit(SequentialAttention(0.5, form="zeros"), model, [batch])
    print(found.importance, found.dropped())
    print(operate(model, found)(**batch, labels=batch["input_ids"]).loss.item())
