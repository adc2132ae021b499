"""Token t is an activation outlier if max_c |x_tc| > 1000 mean |x|, an attention outlier if sum_q A_qt >= 0.1 n."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, layers_from, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Statistic, Sum
from heedful.core.summary import Summary, sums
from heedful.kit.pieces import added


@dataclass(frozen=True)
class Counts:
    """Tokens of the texts that went into one layer."""

    texts: float
    activation: float  # outliers in the stream on its way in
    attention: float  # outliers in what the layer's queries look at
    both: float
    first: float  # tokens that are both, and the first of their text

    @property
    def explained(self) -> float:
        """The share of attention outliers that are activation outliers too; nan without any."""
        return self.both / self.attention if self.attention else float("nan")


@dataclass(frozen=True, eq=False)
class Outliers:
    """How far outliers of activations and of attention are the same tokens, by layer, from the second one on."""

    layers: Mapping[int, Counts] = field(repr=False)

    @property
    def total(self) -> Counts:
        """All layers together; a text counts once a layer."""
        return Counts(*(sum(column) for column in zip(*(vars(c).values() for c in self.layers.values()), strict=True)))

    def __str__(self) -> str:
        c = self.total
        return (
            f"{c.attention:.0f} attention outliers, {c.activation:.0f} activation outliers, {c.both:.0f} of them both, "
            f"{c.first:.0f} of these at the first token"
        )


class SystematicOutliers(Method):
    """Whether the tokens that draw attention are the ones with massive activations."""

    paper = Paper(
        "P004",
        "Systematic Outliers in Large Language Models",
        "Yongqi An, Xu Zhao, Tao Yu, Ming Tang, Jinqiao Wang",
        2025,
        "2502.06415",
        "ICLR 2025",
        differs=(
            "Of the paper's three kinds, outliers of weights are left out: they stand in the feed-forward projections, "
            "which are no site of attention.",
            "A layer's attention is matched with the stream on its way in, so the first layer has no count.",
            "The channels are told by MaxActivations.",
            "A text may come in several calls, each going on where the last one ended; one-token decoding steps, and "
            "what follows them, are not counted.",
        ),
    )
    # magnitude over the text's mean one; the paper's default
    times: Annotated[float, Gt(1)] = 1000.0
    share: PositiveShare = 0.1  # weight that a token gets on average; the paper's default

    @classmethod
    def example(cls) -> SystematicOutliers:
        return cls(times=2.0)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @sums("received")
    def match(self, pattern: Summary, call: Call) -> Statistic | None:
        layer, sizes = call.state.forward.get("sizes", (None, None))
        if pattern.received is None or sizes is None or layer != call.below or call.cross:
            return None
        received = call.keys.by_position(pattern.received.mean(1, keepdim=True))[:, 0]  # [b k]
        text = added(call, "tokens", received=received[:, : sizes["peak"].shape[-1]], **sizes)
        if text is None:
            return None
        before, now = text
        return Sum.of(self._counted(**now) - (0 if before is None else self._counted(**before)))

    def _counted(self, received: Tensor, peak: Tensor, size: Tensor, rows: Tensor) -> Tensor:
        """Texts, their outliers of both kinds, those that are both, and first tokens among these."""
        heard = (received >= self.share * rows) & (rows > 0)
        massive = peak > self.times * size / rows.clamp(min=1)
        both = heard & massive
        return torch.stack([x.sum() for x in (rows > 0, massive, heard, both, both[:, 0])]).double()

    @reads(Site.RESIDUAL)
    def find(self, stream: Tensor, call: Call) -> None:
        """Leave the tokens' sizes for the next layer, whose attention they may draw."""
        is_text = call.is_text[:, 0, :, None]
        size = stream.detach().abs()
        if call.queries.is_filled is not None:
            size = size.where(is_text, 0.0)
        peak = call.queries.by_position(size.amax(-1)[:, None])[:, 0]  # [b k]
        rows = is_text.sum(1).expand(len(size), 1)
        sizes = {"peak": peak, "size": size.mean(-1).sum(-1, keepdim=True), "rows": rows}
        call.state.forward["sizes"] = call.layer, sizes

    def answer(self, readings: Readings) -> Outliers:
        return Outliers({n: Counts(*stat.value.tolist()) for n, stat in readings.items()})

    def describe(self, answer: Outliers) -> Description:
        layers, total = answer.layers, answer.total
        lines = {
            "attention outliers": [c.attention / c.texts for c in layers.values()],
            "activation outliers": [c.activation / c.texts for c in layers.values()],
            "both": [c.both / c.texts for c in layers.values()],
        }
        curves = Curves(
            "outliers",
            "Outlying tokens",
            f"How many tokens of a text get {percent(self.share)} of the attention or more, how many carry a massive "
            "activation on their way into the layer, and how many do both.",
            x=list(layers),
            lines={name: torch.tensor(line) for name, line in lines.items()},
            x_label="layer",
            y_label="tokens a text",
            folded=True,
        )
        if not total.attention:
            return Description((curves,))
        where = [n for n, c in layers.items() if c.both]
        text = f"{percent(total.explained)} of the tokens that draw much attention carry a massive activation"
        if where:
            first = percent(total.first / total.both)
            text += f" ({layers_from(where[0], where[-1])}), {first} of them the first token"
        return Description((curves,), findings=(Finding(f"{text}.", 0.1 + 0.4 * total.explained, shows="outliers"),))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, SystematicOutliers()) as run:
        run(**text)
        print(run[SystematicOutliers()])
    for finding in SystematicOutliers().describe(run[SystematicOutliers()]).findings:
        print(finding.text)
