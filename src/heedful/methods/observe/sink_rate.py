"""alpha_k = mean of A_ik over rows i that see key k; Sink_k = share of texts, layers, heads with alpha_k > epsilon."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, HeadMap, Role, layers_from, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, ShareBelowOne
from heedful.core.stats import Mean, Statistic
from heedful.core.summary import Summary, sums
from heedful.kit.octaves import EDGES
from heedful.kit.pieces import added

NAN = float("nan")
ACTS = ("SinkWindow", "ACT", "ClippedSoftmax", "SigmoidAttention", "GatedHeads")


@dataclass(frozen=True, eq=False)
class Sinks:
    """Which text positions are sinks, by layer; nan at positions that no text reached."""

    rate: dict[int, Tensor] = field(repr=False)  # [h k]: share of texts in which the key at position k is a sink
    importance: dict[int, Tensor] = field(repr=False)  # [h k]: alpha_k, averaged over texts

    @property
    def by_position(self) -> Tensor:
        """The paper's Sink_k, `[k]`: over texts, layers and heads. Late positions average few rows."""
        return torch.cat(_even(list(self.rate.values()))).nanmean(0)

    @property
    def first(self) -> float:
        """The paper's figure: the sink rate of the first token."""
        return float(self.by_position[0])

    def by_layer(self, position: int = 0) -> dict[int, float]:
        """The sink rate of one position in each layer, over texts and heads."""
        return {layer: float(rate[:, position].nanmean()) for layer, rate in self.rate.items()}

    def __str__(self) -> str:
        layers = ", ".join(f"{n}: {x:.0%}" for n, x in self.by_layer().items())
        return f"first-token sink rate {self.first:.1%}; by layer {layers}"


@dataclass(frozen=True, eq=False)
class Columns(Statistic, by_element=True):
    """Means over texts, at the first positions of each head, and further on of all heads together."""

    early: Tensor  # [2 h p], sums of what the counts count
    early_count: Tensor
    later: Tensor  # [2 k-p], over heads too
    later_count: Tensor

    @classmethod
    def of(cls, total: Tensor, count: Tensor, places: int | None) -> Self:
        """From `[2 h k]` and `[h k]`."""
        early, later = (Mean.of(total[..., part], count[..., part]) for part in (slice(places), slice(places, None)))
        if places is None:
            later = Mean.of(total[..., :0], count[..., :0])
        # a copy, so that a few positions do not keep the sums of all of them
        return cls(early.total.clone(), early.count, later.total.sum(1), later.count.sum(1))

    def merge(self, other: Self) -> Self:
        early = Mean(self.early, self.early_count) + Mean(other.early, other.early_count)
        later = Mean(self.later, self.later_count) + Mean(other.later, other.later_count)
        return type(self)(early.total, early.count, later.total, later.count)

    @property
    def fits(self) -> bool:
        early, later = Mean(self.early, self.early_count), Mean(self.later, self.later_count)
        return early.fits and later.fits and self.early.shape[:-2] == self.later.shape[:-1]

    @property
    def value(self) -> Tensor:
        """`[2 h k]`; where no head is told by itself each has the mean of all."""
        early, later = self.early / self.early_count, self.later / self.later_count
        return torch.cat([early, later[:, None].expand(-1, early.shape[1], -1)], -1)


def _even(rows: list[Tensor]) -> list[Tensor]:
    n = max(x.shape[-1] for x in rows)
    return [torch.nn.functional.pad(x, (0, n - x.shape[-1]), value=NAN) for x in rows]


def _curves(importance: dict[int, Tensor]) -> Curves:
    """Importance by position in the lower, middle and upper third of the layers."""
    means = torch.stack([x.nanmean(0) for x in _even(list(importance.values()))])
    edges = [edge for edge in EDGES if edge < means.shape[1]]
    binned = torch.stack([x.nanmean(1) for x in means.tensor_split(edges[1:], 1)], 1)
    names = list(importance)
    lines = {
        layers_from(names[part[0]], names[part[-1]]): binned[part].nanmean(0)
        for part in torch.arange(len(binned)).tensor_split(min(3, len(binned)))
    }
    what = (
        "How much of the attention of the tokens that see it a token gets by its position, averaged over heads; those "
        "near the end are seen by few, mostly by themselves."
    )
    x = [edge + 1 for edge in edges]  # from one, for the logarithm
    label = "share of attention"
    return Curves("sink_positions", "Attention by position", what, x, lines, "position", label, log_x=True, log_y=True)


def _finding(rate: Tensor, layers: list[int], limit: str) -> Finding:
    parks = torch.where(rate.isnan(), NAN, (rate > 0.5).to(rate.dtype))
    share = float(parks.nanmean())
    if not share:
        text = f"No attention sink: no head gives the first token more than {limit} of its attention in most texts."
        return Finding(text, 0.1, shows="sinks")
    text = f"{percent(share)} of heads have an attention sink, the first token, which gets more than {limit}"
    most = (parks.nanmean(1) >= 0.5).nonzero()[:, 0].tolist()
    if most and most[0] > 0:
        text += f"; from layer {layers[most[0]]} on {percent(float(parks[most[0] :].nanmean()))} do"
    return Finding(f"{text}.", min(0.9, 0.2 + share), ACTS, "sinks")


class SinkRate(Method):
    """How often a position draws attention whatever it says: counted over texts, for each layer and head."""

    paper = Paper(
        "P025",
        "When Attention Sink Emerges in Language Models: An Empirical View",
        "Xiangming Gu, Tianyu Pang, Chao Du, Qian Liu, Fengzhuo Zhang, Cunxiao Du, Ye Wang, Min Lin",
        2025,
        "2410.10781",
        "ICLR 2025",
        differs=(
            "A key's mean is over the text rows whose mask lets them see it, so that padding, windows and encoders "
            "come out right; in a causal text that is the authors' number of rows from the key on.",
            "Weights are taken as they are; the authors divide unnormalised ones by their row sum first.",
            "Text length is the caller's choice; the authors cut every text to 64 tokens.",
            "A text may come in several calls, each going on where the last one ended; one-token decoding steps, and "
            "what follows them, are not counted.",
        ),
    )
    epsilon: ShareBelowOne = 0.3  # weight; the paper's default, strictly above
    # tokens for which each head is told by itself, all by default; further on the mean is
    places: PositiveInt | None = None

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @sums("received")
    def weigh_keys(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.received is None or pattern.seen is None:
            return None
        total, count = torch.broadcast_tensors(*map(call.keys.by_position, (pattern.received, pattern.seen)))
        if (text := added(call, "keys", total=total, count=count)) is None:
            return None
        before, now = text
        if before is None:
            return Columns.of(*self._counted(**now), self.places)
        # the text so far was counted already: what it counts as now takes the place of that
        total, count = (x - y for x, y in zip(self._counted(**now), self._counted(**before), strict=True))
        return Columns.of(total, count, self.places)

    def _counted(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What texts add to sums and counts, `[2 h k]` and `[h k]`, from what their keys received `[b h k]`."""
        reached = count > 0
        alpha = (total / count).where(reached, 0.0).double()  # differences of what was counted must leave nothing
        sink = (alpha > self.epsilon).to(alpha.dtype)
        return torch.stack([sink, alpha]).sum(1), reached.sum(0)

    def answer(self, readings: Readings) -> Sinks:
        found = {layer: stat.value for layer, stat in readings.items()}
        return Sinks({n: x[0] for n, x in found.items()}, {n: x[1] for n, x in found.items()})

    def describe(self, answer: Sinks) -> Description:
        layers = list(answer.rate)
        rate, weight = (pad_sequence([x[n][:, 0] for n in layers], True, NAN) for x in (answer.rate, answer.importance))
        limit = percent(self.epsilon)
        what = "The share of its attention that each head gives to the first token, averaged over tokens that see it."
        often = f"The share of texts in which a head gives the first token more than {limit} of its attention."
        parks = {(layers[i], h): float(weight[i, h]) for i, h in (rate > 0.5).nonzero().tolist()}
        role = Role(
            "attention sink",
            f"Gives the first token more than {limit} of its attention in most texts, whatever that token says.",
            dict(sorted(parks.items(), key=lambda head: -head[1])),
        )
        figures = (
            HeadMap("sinks", "Attention on the first token", what, layers, weight, low=0, high=1),
            HeadMap("sink_rate", "Sink rate of the first token", often, layers, rate, low=0, high=1),
            _curves(answer.importance),
        )
        return Description(figures, (role,), (_finding(rate, layers, limit),))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, SinkRate()) as run:
        run(**text)
        print(run[SinkRate()])
