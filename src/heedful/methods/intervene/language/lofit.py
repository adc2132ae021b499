"""Localised fine-tuning: h + v at a few heads; scales (1 + a) h, trained first, tell which heads."""

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
from heedful.core.kinds.weights import HeadWeights
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, PositiveShare
from heedful.core.sites import Site, at
from heedful.kit.head_search import Head, heads_here
from heedful.kit.seeds import seed_of


class LoFiT(Method):
    """Adds a learned offset to the output of the few heads that a task needs most.

    `fit` takes batches with `labels`, which give the model a loss. What it finds folds into a bias of the projection,
    where the projection has one.
    """

    paper = Paper(
        "P084",
        "LoFiT: Localized Fine-tuning on LLM Representations",
        "Fangcong Yin, Xi Ye, Greg Durrett",
        2024,
        "2406.01563",
        "NeurIPS 2024",
        differs=(
            "The rates, the penalty and the five passes are those of the authors' scripts for one task; the paper "
            "chooses them for each.",
            "The paper also tells how to train offsets by preferences (DPO); here the loss is the model's own.",
        ),
    )
    share: PositiveShare = 0.03  # of all heads; the paper: 0.03 to 0.1
    epochs: PositiveInt = 5  # passes over the batches in each of the two steps; the authors' scripts: 5
    select_rate: PositiveFloat = 5e-3  # AdamW's rate for the scales; the authors' scripts: 5e-3
    rate: PositiveFloat = 1e-2  # AdamW's rate for the offsets; the authors' scripts: about 1e-2
    penalty: NonNegativeFloat = 5e-4  # on the sum of |a|; the authors' scripts: 5e-4
    heads: tuple[Head, ...] = ()  # (layer, head) pairs to train in place of chosen ones
    offsets: Fitted | None = None  # v.<layer> [h d], zero in heads that were not chosen
    strength: float = 1.0  # factor on the offsets; the paper: 1
    seed: int | None = None  # without a fit: random offsets in every head

    @classmethod
    def neutral(cls) -> LoFiT:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> LoFiT:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        if self.strength == 0:
            return True
        positions = [(int(name.removeprefix("v.")), 0) for name in self.offsets or ()]
        return not heads_here(self, positions, call, "offsets") and self.offsets is not None

    @at(Site.HEAD_OUTPUT)
    def shift(self, heads: Tensor, call: Call) -> Tensor:
        added = self._offset(heads.shape[1], heads.shape[3], call.layer)
        return heads if added is None else heads + added.to(heads)[:, None]

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        added = self._offset(layer.heads, layer.value_dim, layer.number)
        if added is None:
            return weights
        bias = torch.einsum("ehd,hd->e", weights.o.float(), added.to(weights.o.device).float())
        return replace(weights, o_bias=bias if weights.o_bias is None else weights.o_bias + bias)

    def _offset(self, h: int, d: int, layer: int) -> Tensor | None:
        """What a layer's heads get, `[h d]`; None where that is nothing."""
        if self.strength == 0:
            return None
        if self.offsets is None:
            draw = torch.Generator().manual_seed(4099 * seed_of(self, "offsets", "to batches with labels") + layer)
            return self.strength * torch.randn(h, d, generator=draw)
        found = self.offsets.get(f"v.{layer}")
        if found is not None and found.shape != (h, d):
            rule = f"were fitted to another model: layer {layer} has [h d] = {[h, d]} here"
            raise FieldError(self, "offsets", self.offsets, rule, "heedful.fit(LoFiT(), model, batches)")
        return None if found is None else self.strength * found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> LoFiT:
        found = list(batches)
        if not found or any("labels" not in batch for batch in found):
            raise FieldError(self, "batches", len(found), "must be 1 or more, each with labels", [{"labels": "..."}])
        chosen = self.heads or self._chosen(self._trained(context, _Scales(), found, self.select_rate, self.penalty))
        learner = _Offsets(chosen=tuple(chosen)).on(layers={layer for layer, _ in chosen})
        return replace(
            self, heads=tuple(chosen), offsets=Fitted(self._trained(context, learner, found, self.rate, 0.0))
        )

    def _chosen(self, scales: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """The heads whose scales have moved farthest."""
        norms = {int(name.partition(".")[2]): a.norm(dim=-1).tolist() for name, a in scales.items()}
        ranked = sorted((-x, layer, head) for layer, row in norms.items() for head, x in enumerate(row))
        return [(layer, head) for _, layer, head in ranked[: max(1, round(self.share * len(ranked)))]]

    def _trained(
        self, context: FitContext, learner: Any, batches: list[Mapping[str, Any]], rate: float, penalty: float
    ) -> dict[str, Tensor]:
        """What a learner's parameters are after the passes, "v.LAYER" [h d]."""
        with context.attach(learner) as run, torch.enable_grad():
            optimiser = torch.optim.AdamW(run.parameters(), lr=rate, weight_decay=0.0)
            steps = self.epochs * len(batches)
            schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)  # as the authors' trainer has it
            for step in range(steps):
                loss = run(**batches[step % len(batches)]).loss
                if penalty:
                    loss = loss + penalty * torch.stack([p.abs().sum() for p in run.parameters()]).sum()
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(run.parameters(), 1.0)  # the authors' trainer's default
                optimiser.step()
                schedule.step()
            learned = run.state_dict()
        return {f"v.{name.split('.')[1]}": p.float() for name, p in learned.items()}  # part.layer.name


class _Scales(Method):
    """Heads times 1 + a, a near 0 at first."""

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"a": _noise(layer)}

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        return heads * (1 + call.params["a"])[:, None]


class _Offsets(Method):
    """Offsets that learn, in the chosen heads, near 0 at first."""

    chosen: tuple[tuple[int, int], ...] = ()

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"v": self._mine(layer.number, layer.heads) * _noise(layer)}

    @at(Site.HEAD_OUTPUT)
    def shift(self, heads: Tensor, call: Call) -> Tensor:
        v = call.params["v"]
        return heads + (v * self._mine(call.layer, call.heads).to(v))[:, None]

    def _mine(self, layer: int, heads: int) -> Tensor:
        """1 for chosen heads and 0 for the others, `[h 1]`."""
        mine = sorted(head for number, head in self.chosen if number == layer)
        if mine and mine[-1] >= heads:
            raise FieldError("LoFiT", "heads", (layer, mine[-1]), f"a head must be below {heads}", ((0, 0),))
        return torch.zeros(heads, 1).index_fill(0, torch.tensor(mine, dtype=torch.long), 1.0)


def _noise(layer: Layer) -> Tensor:
    """A start of spread 1e-3, as in the authors' code, `[h d]`."""
    source = torch.Generator().manual_seed(layer.number)
    return 1e-3 * torch.randn(layer.heads, layer.value_dim, generator=source)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    pairs = {"hot": " cold", "big": " small", "up": " down", "old": " young", "fast": " slow", "day": " night"}
    batches = []
    for word, answer in pairs.items():
        text = tokenizer(f"Q: {word}\nA:{answer}", return_tensors="pt")
        labels = torch.full_like(text["input_ids"], -100)
        labels[:, -1] = text["input_ids"][:, -1]
        batches.append({**text, "labels": labels})
    method = fit(LoFiT(), model, batches)
    print(method.heads)
    asked = tokenizer("Q: high\nA:", return_tensors="pt")
    with torch.no_grad(), attach(model, method) as run:
        print(tokenizer.decode(run(**asked).logits[0, -1].argmax()))
