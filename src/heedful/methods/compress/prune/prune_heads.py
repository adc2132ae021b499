"""Drops the heads of least importance E |d loss / d gate| = E |head . d loss / d head|, gate being a factor of 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.labels import labelled, loss_of
from heedful.methods.compress.prune._pruner import HeadPruner

PAPER = Paper(
    "P089",
    "Are Sixteen Heads Really Better than One?",
    "Paul Michel, Omer Levy, Graham Neubig",
    2019,
    "1905.10650",
    "NeurIPS 2019",
    differs=(
        "Query heads that share a key head have one gate and go together; with a key head each, this is the paper's.",
        "The absolute value is taken once a text, as in the paper's formula; the authors' code takes it once a token.",
        "One group a layer always stays, which the authors' code offers as an option.",
        "By default each layer loses equally many, so that a config can tell it and the model saves and loads; form="
        "'uneven' ranks the heads of all layers together, as the paper does.",
    ),
)


class _Gates(Method):
    """A factor on each group of heads, one for each text of a batch, so that its gradient is each text's own."""

    texts: int = 1  # texts in the batch, b

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"gate": torch.ones(self.texts, layer.kv_heads)}

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        gate = call.params["gate"]
        return heads * gate.repeat_interleave(call.heads // call.kv_heads, 1)[..., None, None]


class PruneHeads(HeadPruner):
    """Takes whole heads out of the weights, so that the model is smaller and faster; the authors take 0.2 to 0.4.

    `fit` takes batches that give the model a loss: inputs with `labels`; a causal model's are made from its text.

    form "even": equally many from each layer; where the config has a head width the model saves and loads.
    form "uneven": the least important of all layers, as in the paper; a config cannot tell it, so it lives in memory.
    form "zeros": as "uneven", but silenced in place: nothing gets smaller, and any model saves and loads.
    """

    paper = PAPER

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> PruneHeads:
        total = [torch.zeros(layer.kv_heads, dtype=torch.float64) for layer in context.layers]
        for batch in batches:
            inputs = labelled(batch)
            texts = len(next(x for x in inputs.values() if isinstance(x, Tensor)))
            with context.attach(_Gates(texts)) as run, torch.enable_grad():
                loss_of(self, run, inputs).backward()
                for i, gate in enumerate(run.parameters()):
                    if gate.grad is not None:
                        # a batch's loss is a mean over its texts; times their number, each gradient is its text's own
                        total[i] += gate.grad.double().cpu().abs().sum(0) * texts
        if not total or not all(bool(x.any()) for x in total):
            raise FieldError(
                self, "batches", None, "must reach every layer, with one text or more", [{"labels": "..."}]
            )
        found = {str(i): torch.nn.functional.normalize(x, dim=0) for i, x in enumerate(total)}
        return replace(self, importance=Fitted(found))


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    smaller = operate(model, fit(PruneHeads(0.2), model, [dict(text)]))
    for name, m in (("whole", model), ("pruned", smaller)):
        print(name, m.num_parameters(), m(**text, labels=text["input_ids"]).loss.item())
