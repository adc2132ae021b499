"""sigmoid(w . x_i + c) below 1/2: patch i is left out of later layers; w and c learn which patches are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call, Merged
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, ShareBelowOne
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat
from heedful.kit.merging import MergesTokens, is_fixed, kept
from heedful.kit.regression import log_odds, logistic
from heedful.kit.running import wide


class SelectAndPack(MergesTokens):
    """Leaves later layers the patches that a gate, fitted to labelled ones, selects: of each image as many as it takes.

    `fit(method, model, batches)` wants beside an image's pixels `selected` `[b patches]`, which patches are wanted, as
    those that a box covers.
    """

    paper = Paper(
        "P120",
        "Context-Aware Token Selection and Packing for Enhanced Vision Transformer",
        "Tianyi Zhang, Baoxin Li, Jae-sun Seo, Yu Cao",
        2024,
        "2410.23608",
        "",
        differs=(
            "The authors' abstract and a summary were at hand.",
            "A gate is fitted beside a model as it is; the authors train both at once, with labels at several scales.",
            "One layer is gated; theirs are all of the last two stages, where a patch scores the higher of what it is "
            "given there and before, and what stays is multiplied with its gate.",
            "Rows are as long as the longest selection of the batch, with empty places that nobody sees; the authors "
            "pack the patches of several images into one container.",
            "What is not selected stands still until the last layer is through; theirs goes on in other ways.",
        ),
    )
    # behind which patches are left out
    layer: NonNegativeInt = 3
    least: ShareBelowOne = 0.5  # of the gate, for a patch that stays
    gate: Fitted | None = None  # weight [e], mean [e], deviation [e] and bias [1], from a fit
    seed: int | None = None  # without a fit: a random gate

    @classmethod
    def neutral(cls) -> SelectAndPack:
        return cls(0, 0.0)

    @classmethod
    def example(cls) -> SelectAndPack:
        return cls(0, seed=0)

    def idle(self, call: Call) -> bool:
        return self.least == 0 or call.layer != self.layer

    @at(Site.RESIDUAL, merges=True)
    def select(self, stream: Tensor, call: Call) -> Merged:
        fixed = is_fixed(call).expand(len(stream), -1).clone()
        fixed[:, 0] = True  # of a row that nothing is selected of, something is left
        return kept(stream, (self.gated(stream) >= self.least) | fixed)

    def gated(self, stream: Tensor) -> Tensor:
        """How sure the gate is of each token, `[b n]`."""
        return log_odds(self, "gate", stream).sigmoid()

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SelectAndPack:
        """Logistic regression of the labels on what the stream holds of each patch."""
        if self.layer not in (numbers := [layer.number for layer in context.layers]):
            rule = f"must be a layer of the model, whose last is {max(numbers)}"
            raise FieldError(self, "layer", self.layer, rule, max(numbers) // 3)
        x, labels = [], []
        for batch in batches:
            if "selected" not in batch:
                raise FieldError(
                    self, "batches", sorted(batch), 'must have "selected" [b patches]', [{"selected": "..."}]
                )
            given = {name: value for name, value in batch.items() if name != "selected"}
            part = _Patches(self.layer)
            with torch.no_grad(), context.attach(part) as run:
                run(**given)
                x.append(torch.cat([*run[part].values_by_layer[0]]))
            labels.append(torch.as_tensor(batch["selected"]).to(x[-1]))
            if labels[-1].shape != x[-1].shape[:2]:
                rule = f"must say of {list(x[-1].shape[:2])} patches whether each is selected"
                raise FieldError(self, "batches", tuple(labels[-1].shape), rule, [{"selected": "[b patches], bool"}])
        if not x or len(torch.cat([y.flatten() for y in labels]).unique()) < 2:
            raise FieldError(self, "batches", len(x), "must hold patches of both labels", [{"selected": "[b p]"}])
        points = torch.cat([each.flatten(0, 1) for each in x])
        return replace(self, gate=Fitted(logistic(points, torch.cat([y.flatten() for y in labels]))))


class _Patches(Method):
    """What the stream holds of each patch behind one layer."""

    layer: int

    def idle(self, call: Call) -> bool:
        return call.layer != self.layer

    @reads(Site.RESIDUAL)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        ((start, stop),) = call.region("patches")
        return Cat.of(f"{call.forward}", *wide(stream[:, start:stop]))


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    wanted = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) < 0.4
    fitted = fit(SelectAndPack(layer=0), model, [{**inputs, "selected": wanted}])
    with attach(model, fitted) as run:
        print(run.difference(**inputs))
