"""softmax(lambda_h q k / sqrt(d)): one factor for all heads, or one for each, tuned on long texts."""

from __future__ import annotations

import math
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
from heedful.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.batches import at_least_one


class HeadScale(Method):
    """Sharpens each head by a factor of its own, so that attention stays together beyond the trained length.

    Without a fit every head has `scale`, which is the paper's UniformScale. `fit` takes texts of the length wanted.
    """

    paper = Paper(
        "P207",
        "Length Generalization of Causal Transformers without Position Encoding",
        "Jie Wang, Tao Ji, Yuanbin Wu, Hang Yan, Tao Gui, Qi Zhang, Xuanjing Huang, Xiaoling Wang",
        2024,
        "2404.12224",
        "ACL 2024 Findings",
        differs=(
            "Made for models without position encoding; with rotary embedding it runs as well, and the paper finds "
            "that a uniform scale alone does not help such models.",
            "The paper's scale for each length could not be read; the default and the fit's start are the authors' "
            "script's for 8k tokens from 2k.",
            "The fit follows the authors' script (AdamW with betas 0.9 and 0.95, warm-up over a tenth of the steps, "
            "then a cosine to a tenth of the rate, gradients clipped at 1, factors held at `least` or above), with one "
            "batch a step where theirs has 8 texts; its warm-up begins a step further on, theirs with a rate of 0.",
        ),
    )
    scale: PositiveFloat = 1.6  # factor on the scores of every head, and a fit's start; the authors' script: 1.6
    scales: Fitted | None = None  # s.<layer> [h], from a fit
    steps: PositiveInt = 200  # gradient steps of a fit; the authors: 200
    rate: PositiveFloat = 0.1  # AdamW's highest learning rate in a fit; the authors' script: 0.1 and 0.05
    least: NonNegativeFloat = 1.0  # factors are held at this or above in a fit; the authors: 1

    @classmethod
    def neutral(cls) -> HeadScale:
        return cls(scale=1.0)

    def idle(self, call: Call) -> bool:
        return self.scales is None and self.scale == 1

    @at(Site.QUERY)
    def sharpen(self, query: Tensor, call: Call) -> Tensor:
        factor = self.factor(call.layer, call.depth, query.shape[1])
        return query * (factor.to(query)[:, None, None] if isinstance(factor, Tensor) else factor)

    def factor(self, layer: int, depth: int, heads: int) -> Tensor | float:
        """The factors of a layer's heads `[h]`, or the one of all."""
        if self.scales is None:
            return self.scale
        found = self.scales.get(f"s.{layer}")
        if len(self.scales) != depth or found is None or found.shape != (heads,):
            rule = f"was fitted to another model; this one has {depth} layers, and {heads} heads in layer {layer}"
            raise FieldError(self, "scales", self.scales, rule, "heedful.fit(HeadScale(), model, batches)")
        return found

    def folds(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        factor = self.factor(layer.number, len(self.scales or ()), layer.heads)
        if not isinstance(factor, Tensor):
            factor = torch.full((layer.heads,), factor)
        if bool((factor == 1).all()):
            return weights
        factor = factor.to(weights.q)[:, None]
        bias = None if weights.q_bias is None else weights.q_bias * factor
        return replace(weights, q=weights.q * factor[..., None], q_bias=bias)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> HeadScale:
        """Factors that make the texts likely, all else in the model as it is; `steps` steps go round the batches.

        "labels" in a batch say which tokens count, -100 for those that do not.
        """
        found = [dict(batch) for batch in at_least_one(self, batches)]
        with context.attach(_Learner(self.scale)) as run:
            factors = run.parameters()
            optimiser = torch.optim.AdamW(factors, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0)
            warm = max(1, round(0.1 * self.steps))
            for step in range(self.steps):
                optimiser.param_groups[0]["lr"] = self.rate * _schedule(step, self.steps, warm)
                optimiser.zero_grad()
                _loss(run, found[step % len(found)]).backward()
                torch.nn.utils.clip_grad_norm_(factors, 1.0)
                optimiser.step()
                with torch.no_grad():
                    for factor in factors:
                        factor.clamp_(min=self.least)
            learned = {name.split(".")[1]: p.float() for name, p in run.state_dict().items()}
        return replace(self, scales=Fitted({f"s.{layer}": p for layer, p in learned.items()}))


def _schedule(step: int, steps: int, warm: int) -> float:
    """Share of the rate at a step: up over the first `warm`, then a cosine down to a tenth, the authors' eta_min."""
    down = 0.5 * (1 - math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
    return min(1.0, (step + 1) / warm) * (1 - 0.9 * down)


def _loss(run: Any, batch: Mapping[str, Any]) -> Tensor:
    """Of the text's own tokens, padding left out, or of "labels", where -100 is left out."""
    target = batch.get("labels", batch["input_ids"])[:, 1:]
    logits = run(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if "attention_mask" in batch:
        text = batch["attention_mask"].bool()
        target = target.masked_fill(~(text[:, 1:] & text[:, :-1]), -100)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten())


class _Learner(Method):
    """Factors that learn."""

    start: float

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"scale": torch.full((layer.heads,), self.start)}

    @at(Site.QUERY)
    def sharpen(self, query: Tensor, call: Call) -> Tensor:
        return query * call.params["scale"][:, None, None]


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 8, return_tensors="pt")
    method = fit(HeadScale(scale=1.0, steps=10, least=0.0), model, [text])
    for part in (HeadScale(1.0), HeadScale(1.6), method):
        with torch.no_grad(), attach(model, part) as run:
            print(part, float(_loss(run, text)))
