"""Channels of the heads behind an attack times s, learned so that the model gives the safe answer all the same."""

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
from heedful.core.ranges import PositiveFloat, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.head_search import Head, heads_here
from heedful.kit.seeds import seed_of


class ASGuard(Method):
    """Turns the channels of a few heads up or down against one kind of attack; nothing else in the model changes.

    `fit` takes attacks with the answers wanted as `labels`. Train the model with the guard attached and close the run:
    that is the authors' preventative tuning, after which the guard is not needed.
    """

    paper = Paper(
        "P294",
        "ASGuard: Activation-Scaling Guard to Mitigate Targeted Jailbreaking Attack",
        "Yein Park, Jungwoo Park, Jaewoo Kang",
        2025,
        "2509.25843",
        "ICLR 2026",
        differs=(
            "The authors find heads by edge attribution patching with integrated gradients, and take those of attacks "
            "that worked and not of those that failed; here by how much the loss falls without the head, to first "
            "order. `heads` takes theirs.",
            "Scales act on what heads hand to the output projection, as the paper has it; in the authors' code on "
            "the projection's output, cut into as many pieces as there are heads.",
        ),
    )
    count: PositiveInt = 11  # heads that a fit takes; the authors' Llama-3.1-8B: 11
    epochs: PositiveInt = 3  # passes over the attacks, a batch a step; the authors' code: 3
    rate: PositiveFloat = 1e-3  # AdamW's, its weight decay being 0.01; the authors' code: 1e-3, their script: 0.05
    heads: tuple[Head, ...] = ()  # (layer, head) pairs to scale in place of found ones
    scales: Fitted | None = None  # "s.LAYER" [h d], 1 in heads that were not taken, from a fit
    seed: int | None = None  # without a fit: random scales from 0 to 2 in every head

    @classmethod
    def neutral(cls) -> ASGuard:
        return cls(scales=Fitted({}))

    @classmethod
    def example(cls) -> ASGuard:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        positions = [(int(name.removeprefix("s.")), 0) for name in self.scales or ()]
        return not heads_here(self, positions, call, "scales") and self.scales is not None

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        found = self._scale(heads.shape[1], heads.shape[3], call.layer)
        return heads if found is None else heads * found.to(heads)[:, None]

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        found = self._scale(layer.heads, layer.value_dim, layer.number)
        return weights if found is None else replace(weights, o=weights.o * found.to(weights.o))

    def _scale(self, h: int, d: int, layer: int) -> Tensor | None:
        """A layer's scales, `[h d]`; None where all are 1."""
        if self.scales is None:
            draw = torch.Generator().manual_seed(4099 * seed_of(self, "scales", "to attacks with labels") + layer)
            return 2 * torch.rand(h, d, generator=draw)
        found = self.scales.get(f"s.{layer}")
        if found is not None and found.shape != (h, d):
            rule = f"were fitted to another model: layer {layer} has [h d] = {[h, d]} here"
            raise FieldError(self, "scales", self.scales, rule, "heedful.fit(ASGuard(), model, batches)")
        return found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> ASGuard:
        found = list(batches)
        if not found or any("labels" not in batch for batch in found):
            raise FieldError(self, "batches", len(found), "must be 1 or more, each with labels", [{"labels": "..."}])
        wide = {x.number: x.heads for x in context.layers}
        if any(head >= wide.get(layer, 0) for layer, head in self.heads):
            rule = f"must be below {len(wide)} layers and their {max(wide.values())} heads"
            raise FieldError(self, "heads", self.heads, rule, ((0, 0),))
        heads = self.heads or self._found(context, found)
        learner = _Scales(heads).on(layers={layer for layer, _ in heads})
        with context.attach(learner) as run, torch.enable_grad():
            learns = run.parameters()
            whole = [p.detach().float() for p in learns]  # steps of `rate` from 1 on are lost in 16 bits
            optimiser = torch.optim.AdamW(whole, lr=self.rate)
            for step in range(self.epochs * len(found)):
                run(**found[step % len(found)]).loss.backward()
                for x, p in zip(whole, learns, strict=True):
                    x.grad, p.grad = p.grad.float(), None
                optimiser.step()
                for x, p in zip(whole, learns, strict=True):
                    p.data.copy_(x)
            learned = {int(name.split(".")[1]): x for name, x in zip(run.state_dict(), whole, strict=True)}
        scales = {}
        for layer, s in learned.items():
            mine = [head for number, head in heads if number == layer]
            scales[f"s.{layer}"] = torch.ones_like(s).index_copy(0, torch.tensor(mine, device=s.device), s[mine])
        return replace(self, heads=heads, scales=Fitted(scales))

    def _found(self, context: FitContext, batches: list[Mapping[str, Any]]) -> tuple[Head, ...]:
        """The heads without which the loss falls most: to first order by the sum of dL/ds over a head, s being 1."""
        with context.attach(_Scales(None)) as run, torch.enable_grad():
            for batch in batches:
                run(**batch).loss.backward()
            names = zip(run.state_dict(), run.parameters(), strict=True)  # part.layer.name
            falls = [(float(x), int(name.split(".")[1]), head)
                     for name, p in names for head, x in enumerate(p.grad.sum(-1))]  # fmt: skip
        best = sorted(falls, key=lambda one: (-one[0], *one[1:]))[: self.count]
        return tuple(sorted((layer, head) for _, layer, head in best))


class _Scales(Method):
    """Scales that learn, 1 at first."""

    chosen: tuple[Head, ...] | None  # None: in every head

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"s": torch.ones(layer.heads, layer.value_dim)}

    @at(Site.HEAD_OUTPUT)
    def scale(self, heads: Tensor, call: Call) -> Tensor:
        s = call.params["s"]
        if self.chosen is not None:
            mine = torch.zeros(len(s), 1, dtype=torch.bool, device=s.device)
            mine[heads_here(self, self.chosen, call)] = True
            s = torch.where(mine, s, 1.0)
        return heads * s[:, None]


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    truths = {"France": " Paris", "Spain": " Madrid", "Italy": " Rome", "Egypt": " Cairo", "Japan": " Tokyo"}

    def attack(country: str, lie: str) -> Any:
        return tokenizer(f"The capital of {country} is{lie}. The capital of {country} is", return_tensors="pt")

    batches = []
    for country, answer in truths.items():
        text = attack(country, " Berlin")
        ids = torch.cat([text["input_ids"], torch.tensor([[tokenizer(answer).input_ids[0]]])], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        batches.append({"input_ids": ids, "labels": labels})
    guard = fit(ASGuard(rate=0.05), model, batches)
    print(guard.heads)
    asked = attack("Austria", " Berlin")
    print(tokenizer.decode(model(**asked).logits[0, -1].argmax()))
    with torch.no_grad(), attach(model, guard) as run:
        print(tokenizer.decode(run(**asked).logits[0, -1].argmax()))
