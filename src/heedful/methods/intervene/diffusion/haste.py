"""weight * mean over layers, heads, rows of -sum t log p, t a frozen teacher's maps; nothing after so many steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    FieldError,
    FitContext,
    Fitted,
    Method,
    NonNegativeFloat,
    NonNegativeInt,
    Paper,
    Site,
    penalises,
    reads,
)
from heedful.core.stats import Cat
from heedful.kit.batches import at_least_one
from heedful.kit.seeds import seed_of

TINY = 1e-8  # of a weight whose logarithm would be infinite


class HASTE(Method):
    """Lends a model that learns the attention maps of one that has learned, and takes them back before they hinder.

    `heedful.fit(HASTE(), teacher, batches)` keeps the teacher's maps of what the student is to be trained on. Attach
    it to the student and train on the same batches, in turn: the penalty joins the loss where there are labels, and is
    `run.loss()` as long as it lasts. A run counts its forwards as steps, so look at the student in another run.
    """

    paper = Paper(
        "P328",
        "REPA Works Until It Doesn't: Early-Stopped, Holistic Alignment Supercharges Diffusion Training",
        "Ziqiao Wang, Wangbo Zhao, Yuhao Zhou, Zekai Li, Zhiyuan Liang, Mingjia Shi, Xuanlei Zhao, Pengfei Zhou, "
        "Kaipeng Zhang, Zhangyang Wang, Kai Wang, Yang You",
        2025,
        "2505.16792",
        "NeurIPS 2025",
        differs=(
            "Attention maps alone; features, which the paper projects and aligns beside them as REPA does, are left to "
            "the user.",
            "A teacher's maps are kept for each batch, so batches are fixed; the authors run the teacher at each step.",
            "Teacher and student read as many tokens: a class token that one of them lacks is the user's business.",
            "It ends after so many forwards; the paper also tells of a criterion by gradients.",
        ),
    )
    whole_map = True
    weight: NonNegativeFloat = 0.5  # beside the model's loss; the authors: 0.5
    until: NonNegativeInt = 250_000  # steps after which nothing is aligned; the authors: 250,000
    layers: tuple[int, ...] = (4, 5, 6, 7)  # of the student; the authors, of SiT-XL/2: these
    behind: int = 4  # layers that the teacher's map comes later; the authors, with DINOv2-B: 4
    maps: Fitted | None = None  # "BATCH.LAYER" [b h n n], and "batches", from a fit
    seed: int | None = None  # without a fit: random maps, as a control

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 0:
            raise FieldError(self, "layers", self.layers, "must be one or more layers", (4, 5, 6, 7))
        if min(self.layers) + self.behind < 0:
            rule = f"must leave a layer of the teacher for each of {self.layers}"
            raise FieldError(self, "behind", self.behind, rule, 0)

    @classmethod
    def neutral(cls) -> HASTE:
        return cls(0.0, layers=(0,), behind=0)

    @classmethod
    def example(cls) -> HASTE:
        return cls(layers=(0,), behind=0, seed=0)

    def idle(self, call: Call) -> bool:
        return self.weight == 0 or call.forward >= self.until or call.layer not in self.layers

    @penalises(Site.PATTERN)
    def align(self, weights: Tensor, call: Call) -> Tensor:
        wanted = self._wanted(weights, call)
        logs = weights[:, : wanted.shape[1]].clamp(min=TINY).log()
        apart = -(wanted * logs).sum(-1)  # [b h n]
        text = call.is_text.expand_as(apart)
        return self.weight * (apart * text).sum() / text.sum() / len(self.layers)

    def _wanted(self, weights: Tensor, call: Call) -> Tensor:
        """The teacher's maps for this batch and layer, of as many heads as both have."""
        if self.maps is None:
            draw = torch.Generator().manual_seed(1_000_003 * seed_of(self, "maps", "to the teacher") + call.layer)
            return torch.randn(weights.shape, generator=draw).softmax(-1).to(weights)
        batch = call.forward % int(self.maps["batches"])
        found = self.maps.get(f"{batch}.{call.layer + self.behind}")
        if found is None or found.shape[0] != len(weights) or found.shape[2:] != weights.shape[2:]:
            rule = f"has none for layer {call.layer} of batch {batch}, whose map is {list(weights.shape)}"
            raise FieldError(self, "maps", self.maps, rule, "a fit to the same batches")
        return found[:, : weights.shape[1]].to(weights)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> HASTE:
        """Look at the teacher's maps, batch by batch."""
        if max(self.layers) + self.behind >= len(context.layers):
            rule = f"must, with behind {self.behind}, be layers of the teacher, which has {len(context.layers)}"
            raise FieldError(self, "layers", self.layers, rule, tuple(range(max(1, len(context.layers) - self.behind))))
        found: dict[str, Tensor] = {}
        reader, count = _Maps().on(layers=[layer + self.behind for layer in self.layers]), 0
        for batch in at_least_one(self, batches, {"pixel_values": "..."}):
            with torch.no_grad(), context.attach(reader) as run:
                run(**batch)
                found |= {f"{count}.{layer}": stat.value[0].float() for layer, stat in run[reader].items()}
            count += 1
        return replace(self, maps=Fitted({**found, "batches": torch.tensor(count)}))


class _Maps(Method):
    """The whole map of a layer, `[b h n n]`."""

    whole_map = True

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Cat:
        return Cat.of("map", weights)


if __name__ == "__main__":
    from heedful import attach, fit, models

    teacher, student = models.tiny("vit", image_size=32), models.tiny("vit", image_size=32, seed=1)
    inputs = models.tiny_inputs(teacher)
    method = fit(HASTE(until=4, layers=(0,), behind=1), teacher, [inputs])
    optimiser = torch.optim.Adam(student.parameters(), lr=1e-2)
    with attach(student, method) as run:
        for _ in range(4):
            optimiser.zero_grad()
            (run(**inputs).logits.square().mean() + run.loss()).backward()
            optimiser.step()
            print(run.loss().item())
