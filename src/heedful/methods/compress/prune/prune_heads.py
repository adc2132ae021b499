"""Drops the heads of least importance E |d loss / d gate| = E |head . d loss / d head|, gate being a factor of 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.kinds import HeadWeights, Surgery
from heedful.core.method import FitContext, Layer, Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at

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


class PruneHeads(Surgery):
    """Takes whole heads out of the weights, so that the model is smaller and faster.

    `fit` takes batches that give the model a loss: inputs with `labels`; a causal model's are made from its text.

    form "even": equally many from each layer; where the config has a head width the model saves and loads.
    form "uneven": the least important of all layers, as in the paper; a config cannot tell it, so it lives in memory.
    form "zeros": as "uneven", but silenced in place: nothing gets smaller, and any model saves and loads.
    """

    paper = PAPER
    share: float = 0.2  # share of groups to drop, least important first; the authors: 0.2 (WMT), 0.4 (BERT)
    groups: tuple[tuple[int, int], ...] = ()  # (layer, key head) pairs to drop instead of a share
    form: str = "even"  # where the share is taken from, and what becomes of it: "even", "uneven" or "zeros"
    importance: Fitted | None = None  # "LAYER" [g], of length 1 in each layer

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise FieldError(self, "share", self.share, "must lie between 0 and 1", 0.2)
        if any(len(pair) != 2 or min(pair) < 0 for pair in self.groups):
            raise FieldError(self, "groups", self.groups, "must be pairs of layer and key head", ((0, 0),))
        if self.form not in ("even", "uneven", "zeros"):
            raise FieldError(self, "form", self.form, "must be 'even', 'uneven' or 'zeros'", "even")

    @classmethod
    def neutral(cls) -> PruneHeads:
        return cls(share=0.0)

    @classmethod
    def example(cls) -> PruneHeads:
        return cls(groups=((0, 0),))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> PruneHeads:
        total = [torch.zeros(layer.kv_heads, dtype=torch.float64) for layer in context.layers]
        for batch in batches:
            inputs = _with_labels(batch)
            texts = len(next(x for x in inputs.values() if isinstance(x, Tensor)))
            with context.attach(_Gates(texts)) as run, torch.enable_grad():
                loss = getattr(run(**inputs), "loss", None)
                if loss is None:
                    raise FieldError(self, "batches", sorted(inputs), "give this model no loss; add", {"labels": "..."})
                loss.backward()
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

    def dropped(self) -> tuple[tuple[int, int], ...]:
        """The (layer, key head) pairs that go, of a layer's the least important first."""
        if self.groups or not self.share:
            return tuple(sorted(set(self.groups)))
        if self.importance is None:
            good = "heedful.fit(PruneHeads(), model, batches)"
            raise FieldError(self, "importance", None, "is not known yet: fit, or name `groups`", good)
        by_layer = {int(name): x.tolist() for name, x in self.importance.items()}
        order = sorted((value, layer, group) for layer, x in by_layer.items() for group, value in enumerate(x))
        if self.form == "even":
            count = {layer: min(round(self.share * len(x)), len(x) - 1) for layer, x in by_layer.items()}
            if not any(count.values()):
                rule = f"drops none of a layer's {max(map(len, by_layer.values()))} groups, of which one always stays"
                raise FieldError(self, "share", self.share, f"{rule}; take more, or form='uneven'", 0.5)
            mine = {layer: [group for _, i, group in order if i == layer] for layer in by_layer}
            return tuple((layer, group) for layer, x in mine.items() for group in x[: count[layer]])
        best = {(layer, x.index(max(x))) for layer, x in by_layer.items()}
        free = [(layer, group) for _, layer, group in order if (layer, group) not in best]
        return tuple(free[: round(self.share * len(order))])

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        gone = {group for number, group in self.dropped() if number == layer.number}
        if not gone:
            return weights
        if max(gone) >= layer.kv_heads:
            rule = f"name key head {max(gone)} of layer {layer.number}, which has {layer.kv_heads}; fit to this model"
            raise FieldError(self, "groups", sorted(gone), rule, ((layer.number, 0),))
        kept = tuple(group for group in range(layer.kv_heads) if group not in gone)
        if not kept:
            raise FieldError(self, "groups", sorted(gone), f"leave layer {layer.number} no head", ((layer.number, 0),))
        if self.form != "zeros":
            return weights.keep_groups(kept)
        silent = torch.tensor(sorted(gone)).to(weights.o.device)
        # by groups, o is [e g h/g d]: heads that share a key head stand together
        o = weights.o.unflatten(1, (layer.kv_heads, -1)).index_fill(1, silent, 0.0)
        return replace(weights, o=o.flatten(1, 2))


def _with_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with labels: its own, or its text, padding left out."""
    inputs = dict(batch)
    if "labels" not in inputs and "input_ids" in inputs:
        labels = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        inputs["labels"] = labels if mask is None else labels.masked_fill(mask == 0, -100)
    return inputs


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt")
    smaller = operate(model, fit(PruneHeads(0.2), model, [dict(text)]))
    for name, m in (("whole", model), ("pruned", smaller)):
        print(name, m.num_parameters(), m(**text, labels=text["input_ids"]).loss.item())
