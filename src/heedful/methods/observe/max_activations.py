"""M_l = max over tokens and channels of |x_l|, x_l being the residual stream as it leaves layer l."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Self

import torch
from annotated_types import Gt
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, Listing, percent, rounded
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Max, Statistic

UNPLACED = -1  # this channel was not among the highest of the text that holds its maximum


@dataclass(frozen=True, eq=False)
class Peaks(Statistic, by_element=True):
    """The highest magnitude of each channel and where it stands, beside the sum of all magnitudes."""

    high: Tensor  # [e]
    place: Tensor  # [e]: the token's position
    total: Tensor  # []
    count: Tensor  # []

    def merge(self, other: Self) -> Self:
        top = Max(self.high, self.place) + Max(other.high, other.place)
        return type(self)(top.high, top.place, self.total + other.total, self.count + other.count)

    @property
    def fits(self) -> bool:
        return Max(self.high, self.place).fits and self.total.shape == self.count.shape == self.high.shape[:-1]

    @property
    def mean(self) -> float:
        return float(self.total / self.count)

    @property
    def value(self) -> float:
        return float(self.high.max())

    @property
    def ratio(self) -> float:
        """The maximum over the mean magnitude."""
        return self.value / max(self.mean, 1e-30)

    @property
    def channel(self) -> int:
        return int(self.high.argmax())


@dataclass(frozen=True, eq=False)
class Maxima:
    """The largest activations of each layer's residual stream."""

    layers: Mapping[int, Peaks] = field(repr=False)
    massive: float

    @property
    def top(self) -> int:
        """The layer with the global maximum."""
        return max(self.layers, key=lambda n: self.layers[n].value)

    @property
    def massive_layers(self) -> list[int]:
        return [n for n, peaks in self.layers.items() if peaks.ratio > self.massive]

    def massive_channels(self) -> dict[int, list[int]]:
        """The layers in which each channel is massive; channels massive in most layers first."""
        found: dict[int, list[int]] = {}
        for n, peaks in self.layers.items():
            for channel in (peaks.high > self.massive * peaks.mean).nonzero()[:, 0].tolist():
                found.setdefault(channel, []).append(n)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def __str__(self) -> str:
        peak = self.layers[self.top]
        told = f"largest activation {rounded(peak.value)} in layer {self.top}"
        return f"{told}, {rounded(peak.ratio)} x the layer's mean magnitude"


class MaxActivations(Method):
    """How large the residual stream gets, in which layer and channel and at which token: what quantising must bear."""

    paper = Paper(
        "P309",
        "Measuring Maximum Activations in Open Large Language Models",
        "Luxuan Chen, Han Tian, Xinran Chen, Rui Kong, Fang Wang, Jiamin Chen, Yuchen Li, Jiashu Zhao, "
        "Shuaiqiang Wang, Haoyi Xiong, Dawei Yin",
        2026,
        "2605.15572",
        differs=(
            "The residual stream after each layer alone, which holds the maximum in 22 of the authors' 24 models; they "
            "read embeddings, attention, feed-forward, gates and the final norm too.",
            "Magnitudes; the authors keep the signed maximum and minimum.",
            "The threshold for 'massive' is that of Systematic Outliers (P004); the authors' code counts, beside the "
            "maximum, tokens above 100 and above 1000 times their own median.",
            "Positions are kept for the 8 largest channels of a text.",
        ),
    )
    one_text = True
    # times the layer's mean magnitude; above it an activation is called massive
    massive: Annotated[float, Gt(1)] = 1000.0

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @reads(Site.RESIDUAL)
    def find_peaks(self, stream: Tensor, call: Call) -> Statistic | None:
        size = stream.detach().abs()
        is_text = call.is_text[:, 0, :, None]
        if call.queries.is_filled is not None:
            size = size.masked_fill(~is_text, 0.0)
        high = size.amax(1)  # [b e]
        # looking up places is dear in a strided maximum, so only the few that can be massive get theirs
        top = high.topk(min(8, high.shape[-1]), -1).indices
        rows = size.gather(2, top[:, None].expand(-1, size.shape[1], -1)).argmax(1)
        position = call.q_pos[:, 0].expand(len(size), -1).gather(1, rows)
        place = torch.full_like(high, UNPLACED, dtype=torch.long).scatter(1, top, position)
        peak = Max.of(high.mT, place.mT)
        count = is_text.expand(len(size), -1, -1).sum() * size.shape[-1]
        return Peaks(peak.high, peak.place, size.sum().double(), count)

    def answer(self, readings: Readings) -> Maxima:
        return Maxima({n: stat for n, stat in readings.items() if isinstance(stat, Peaks)}, self.massive)

    def describe(self, answer: Maxima) -> Description:
        layers = answer.layers
        curves = Curves(
            "maxima",
            "Largest activations by layer",
            "The largest number anywhere in the residual stream after each layer, beside the mean magnitude there; "
            "a wide gap means that a few channels outshout all others.",
            x=list(layers),
            lines={
                "largest": torch.tensor([p.value for p in layers.values()]),
                "mean": torch.tensor([p.mean for p in layers.values()]),
            },
            x_label="layer",
            y_label="magnitude",
            log_y=True,
        )
        channels = answer.massive_channels()
        listing = Listing(
            "massive_channels",
            "Massive channels",
            f"Channels with an activation above {self.massive:g} times their layer's mean magnitude, and the largest "
            "one with its place in the text.",
            columns=("channel", "layers", "from", "to", "largest", "in layer", "at position"),
            rows=[self._row(answer, channel, where) for channel, where in list(channels.items())[:12]],
        )
        return Description((curves, listing) if channels else (curves,), findings=(self._finding(answer),))

    def _row(self, answer: Maxima, channel: int, where: list[int]) -> tuple[object, ...]:
        best = max(where, key=lambda n: float(answer.layers[n].high[channel]))
        peaks = answer.layers[best]
        place = int(peaks.place[channel])
        size = float(f"{float(peaks.high[channel]):.4g}")
        return channel, len(where), where[0], where[-1], size, best, "" if place == UNPLACED else place

    def _finding(self, answer: Maxima) -> Finding:
        peak, where = answer.layers[answer.top], answer.massive_layers
        place = int(peak.place[peak.channel])
        text = (
            f"The largest activation is {rounded(peak.value)} ({rounded(peak.ratio)} × the mean), in channel "
            f"{peak.channel} after layer {answer.top} at {'the first token' if place == 0 else f'token {place}'}"
        )
        if not where:
            return Finding(f"{text}; no layer has massive activations.", 0.1, shows="maxima")
        share = percent(len(where) / len(answer.layers))
        acts = ("ClippedSoftmax", "GatedHeads")
        return Finding(f"{text}; {share} of layers carry massive activations.", 0.7, acts, "maxima")


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, MaxActivations()) as run:
        run(**text)
        print(run[MaxActivations()])
    for finding in MaxActivations().describe(run[MaxActivations()]).findings:
        print(finding.text)
