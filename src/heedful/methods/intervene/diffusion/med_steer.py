"""x <- |x| (x - s max(0, x v) v) / |...| for what cross-attention gives a place; v: with a concept, less without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Mean
from heedful.kit.seeds import seed_of

Step = tuple[int, int]  # its number, and how many there are


class MedSteer(Method):
    """Takes a concept out of a picture in the making: what its words add to the places is turned from it.

    `fit` takes batches of a denoiser's inputs, each with "positive" (whether its words name the concept, or what stands
    in its place) and "step" (its number, and of how many), and finds a vector for each layer and step.
    """

    paper = Paper(
        "P307",
        "MedSteer: Counterfactual Endoscopic Synthesis via Training-Free Activation Steering",
        "Trong-Thang Pham, Loc Nguyen, Anh Nguyen, Hien Nguyen, Ngan Le",
        2026,
        "2603.07066",
        differs=(
            "Strength and formula are those of the authors' code; their README has a strength of 1.",
            "With guidance by a text and by none, both halves of a batch are steered, as in the authors' code, and "
            "both are read in a fit, where the authors read the half with the text.",
        ),
    )
    subjects = ("cross",)
    strength: NonNegativeFloat = 2.0  # s; 1 takes the concept's share away, 2 turns it round; the authors' code: 2
    vectors: Fitted | None = None  # "v.LAYER.STEP" [e], of length 1, from a fit
    seed: int | None = None  # draw random vectors in place of fitted ones: the control that any steering needs

    @classmethod
    def neutral(cls) -> MedSteer:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> MedSteer:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return not call.cross or self.strength == 0

    @at(Site.OUTPUT)
    def steer(self, x: Tensor, call: Call) -> Tensor:
        vector = self._vector(x.shape[-1], call).to(x)
        towards = (x @ vector).clamp(min=0)[..., None]
        return F.normalize(x - self.strength * towards * vector, dim=-1) * x.norm(dim=-1, keepdim=True)

    def _vector(self, width: int, call: Call) -> Tensor:
        step = 0 if call.denoising is None else call.denoising.number
        if self.vectors is None:
            seed = seed_of(self, "vectors", "to forwards with and without the concept")
            draw = torch.Generator().manual_seed(1_000_003 * seed + 1009 * step + call.layer)
            return F.normalize(torch.randn(width, generator=draw), dim=-1)
        steps = {int(name.rpartition(".")[2]) for name in self.vectors if name.startswith(f"v.{call.layer}.")}
        found = self.vectors.get(f"v.{call.layer}.{min(step, max(steps, default=0))}")
        if found is None or found.shape != (width,):
            rule = f"have no vector of width {width} for layer {call.layer} and step {step}: fit to this model"
            raise FieldError(self, "vectors", self.vectors, rule, "heedful.fit(MedSteer(), model, batches)")
        return found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> MedSteer:
        """The difference of means over places and pictures, of each layer and step."""
        groups: dict[tuple[Step, bool], list[dict[str, Any]]] = {}
        for given in batches:
            batch = dict(given)
            if "positive" not in batch:
                raise FieldError(self, "batches", sorted(batch), "need 'positive' in each", {"positive": True})
            number, of = batch.pop("step", (0, 1))
            step = (number, of)
            groups.setdefault((step, bool(batch.pop("positive"))), []).append(batch)
        steps = {step for step, _ in groups}
        if not steps or any((step, side) not in groups for step in steps for side in (True, False)):
            rule = "must hold, for each step, forwards with the concept and without"
            raise FieldError(self, "batches", len(groups), rule, [{"positive": True, "step": (0, 20)}])
        means: dict[tuple[Step, bool], dict[int, Tensor]] = {}
        for (step, side), each in groups.items():
            with context.attach(_Outputs()) as run, run.denoising(*step), torch.no_grad():
                for batch in each:
                    run(**batch)
                means[step, side] = run[_Outputs()]
        return replace(
            self,
            vectors=Fitted(
                {
                    f"v.{layer}.{step[0]}": F.normalize(mean - means[step, False][layer], dim=-1).float()
                    for step in steps
                    for layer, mean in means[step, True].items()
                }
            ),
        )


class _Outputs(Method):
    """The mean of what cross-attention gives to a place, `[e]` by layer."""

    def idle(self, call: Call) -> bool:
        return not call.cross

    @reads(Site.OUTPUT)
    def read(self, x: Tensor, call: Call) -> Mean:
        places = call.is_text[:, 0, :, None].expand(*x.shape[:2], 1)
        return Mean.of((x.double() * places).sum((0, 1)), float(places.sum()))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: stat.value for layer, stat in readings.items()}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (4, 12))
    given = [
        {"input_ids": ids.clamp(low, high), "decoder_input_ids": ids, "positive": low > 3}
        for low, high in ((3, 30), (31, 60))
    ]
    method = fit(MedSteer(), model, given)
    with attach(model, method) as run:
        print(run.difference(input_ids=ids, decoder_input_ids=ids))
