"""alpha_h = std(s) / std(s') on head h's scores, beta = rms(y) / rms(y') on a layer's output, ' once rounded."""

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
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.kit.batches import at_least_one
from heedful.methods.compress.quantise.absmax import Absmax

PAPER = Paper(
    "P327",
    "QuantVLA: Scale-Calibrated Post-Training Quantization for Vision-Language-Action Models",
    "Jingxuan Zhang, Yunta Hsieh, Zhongwei Wan, Haokun Lin, Xin Wang, Ziqi Wang, Yingtie Lei, Mi Zhang",
    2026,
    "2602.20309",
    "CVPR 2026",
    differs=(
        "Written from the authors' code, the paper's text not being at hand.",
        "The two scales alone, on any model and after any rounding of attention's projections. The paper rounds all "
        "other linear maps of a language model and of a diffusion head, and leaves these projections as they are.",
        "Scales are found in two rounds: those of scores, then those of outputs with the scores in order; the authors "
        "measure both in one.",
        "Spread and size are those of all texts together; the authors take the mean of each text's.",
    ),
)


class QuantVLA(Surgery):
    """Rounds as `quantiser` does, then gives scores their spread and layers' outputs their size back.

    Both scales go into the weights, and cost nothing. Neither may go far, and one of nearly 1 is left out. `fit` takes
    batches of text, and fits the quantiser too. Where a norm follows the query projection, as in Qwen3, the scale of
    scores is lost in it.
    """

    paper = PAPER
    quantiser: Surgery = Absmax(4)  # what rounds
    scales: Fitted | None = None  # "LAYER" [h + 1]: of each head's scores, and of the output
    scores: tuple[float, float] = (0.7, 1.4)  # the least and the largest scale of a head's scores; the authors' code
    reach: NonNegativeFloat = 0.3  # how far from 0 the logarithm of an output's scale may lie; the authors' code
    near: tuple[float, float] = (0.02, 0.03)  # what scores' scales, and outputs' logarithms, must differ by to count

    def __post_init__(self) -> None:
        if len(self.scores) != 2 or not 0 < self.scores[0] <= 1 <= self.scores[1] < math.inf:
            rule = "must be a scale above 0 and up to 1, and one from 1 up"
            raise FieldError(self, "scores", self.scores, rule, (0.7, 1.4))
        if len(self.near) != 2 or not all(0 <= x < math.inf for x in self.near):
            raise FieldError(self, "near", self.near, "must be two distances of 0 or more", (0.02, 0.03))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> QuantVLA:
        shown = [dict(batch) for batch in at_least_one(self, batches)]
        layers = context.layers
        ones = {str(x.number): torch.ones(x.heads + 1, dtype=torch.float64) for x in layers}
        how = replace(self, quantiser=self.quantiser.fit(context, shown), scales=Fitted(ones))
        for reader, place, kept in (
            (_Spread(), slice(None, -1), self._of_scores), (_Size(), slice(-1, None), self._of_output),
        ):  # fmt: skip
            whole, rounded = (_read(of, reader, shown) for of in (context, context.after(how)))
            for number, x in ones.items():
                a, b = whole[int(number)], rounded[int(number)]
                x[place] = torch.where((a > 0) & (b > 0), kept(a / b), 1.0)
            how = replace(how, scales=Fitted(ones))
        return how

    def _of_scores(self, scale: Tensor) -> Tensor:
        scale = scale.clamp(*self.scores)
        return torch.where((scale - 1).abs() < self.near[0], 1.0, scale)

    def _of_output(self, scale: Tensor) -> Tensor:
        by = scale.log().clamp(-self.reach, self.reach)
        return torch.where(by.abs() < self.near[1], 1.0, by.exp())

    def require_depth(self, depth: int) -> None:
        self.quantiser.require_depth(depth)

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        mine = None if self.scales is None else self.scales.get(str(layer.number))
        if mine is None or len(mine) != layer.heads + 1:
            found = None if mine is None else len(mine) - 1
            rule = f"must be of {layer.heads} heads in layer {layer.number}: fit to this model"
            raise FieldError(self, "scales", found, rule, "heedful.fit(QuantVLA(Absmax(4)), model, batches)")
        w = self.quantiser.operate(weights, layer)
        if w.q.shape != weights.q.shape or w.k.shape != weights.k.shape:
            raise FieldError(self, "quantiser", self.quantiser, "must leave every head in its place", "Absmax(4)")
        scores, output = mine[:-1].to(w.q)[:, None], mine[-1].to(w.q)
        return replace(
            w, q=w.q * scores[..., None], q_bias=None if w.q_bias is None else w.q_bias * scores,
            o=w.o * output, o_bias=None if w.o_bias is None else w.o_bias * output,
        )  # fmt: skip


class _Spread(Method):
    """How many scores each head has, their sum, and that of their squares: `[3 h]`."""

    paper = PAPER

    @reads(Site.SCORES)
    def read(self, scores: Tensor, call: Call) -> Sum:
        kept = call.is_text[..., None].expand_as(scores)
        kept = kept if call.keep is None else kept & call.keep
        s = scores.double().masked_fill(~kept, 0.0)
        return Sum.of(torch.stack([x.sum((0, 2, 3)) for x in (kept.double(), s, s.square())]))

    def told(self, x: Tensor) -> Tensor:
        """The standard deviation of each head's scores."""
        mean = x[1] / x[0]
        return (x[2] / x[0] - mean.square()).clamp(min=0).sqrt()


class _Size(Method):
    """The sum of the squares of what the layer gives; two models are shown as many numbers."""

    paper = PAPER

    @reads(Site.OUTPUT)
    def read(self, output: Tensor, call: Call) -> Sum:
        return Sum.of((output * call.is_text[:, 0, :, None]).double().square().sum())

    def told(self, x: Tensor) -> Tensor:
        """Its root."""
        return x.sqrt()


def _read(context: FitContext, reader: _Spread | _Size, batches: list[dict[str, Any]]) -> dict[int, Tensor]:
    """What a reader tells of each layer."""
    with torch.no_grad(), context.attach(reader) as run:
        for batch in batches:
            run(**batch)
        return {number: reader.told(stat.value) for number, stat in run[reader].items()}


if __name__ == "__main__":
    from heedful import fit, models, operate

    model, tokenizer, _ = models.default()
    text = dict(tokenizer("The sun rises in the east and sets in the west, and so does the moon.", return_tensors="pt"))
    for how in (Absmax(3), fit(QuantVLA(Absmax(3)), model, [text])):
        print(operate(model, how)(**text, labels=text["input_ids"]).loss.item())
