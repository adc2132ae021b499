"""p_k = sum_q A_qk / n: a frame is centralised if one token has p_k >= share, bidirectional if both ends have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.stats import Statistic, Sum
from heedful.core.summary import Summary, sums
from heedful.kit.pieces import added

NONE = "none"
FRAMES = ("centralised", "bidirectional", "distributed", NONE)


@dataclass(frozen=True)
class Frame:
    """Means over the texts that went into one layer."""

    texts: float
    kinds: Mapping[str, float]  # the share of texts that have each frame
    first: float  # the share of all attention that the first token draws
    last: float  # and the last one
    between: float  # and whichever between them draws most
    centralisation: float  # Freeman's, of a graph's in-degrees: 1 where all look at one token, 0 where at all alike

    @property
    def kind(self) -> str:
        """The frame that most texts have."""
        return max(self.kinds, key=lambda name: self.kinds[name])


@dataclass(frozen=True, eq=False)
class Frames:
    """Which tokens a layer's attention refers to."""

    layers: Mapping[int, Frame] = field(repr=False)
    share: float

    def mean(self, what: str) -> float:
        """Over layers: "first", "last", "between", "centralisation", or the name of a frame."""
        each = [f.kinds[what] if what in FRAMES else getattr(f, what) for f in self.layers.values()]
        return sum(each) / len(each) if each else 0.0

    @property
    def kind(self) -> str:
        """The model's frame: the most common one, and bidirectional where layers share the two ends among them."""
        if not self.layers:
            return NONE
        if min(self.mean("first"), self.mean("last")) >= self.share:
            return "bidirectional"
        return max(FRAMES, key=lambda name: (name != NONE and self.mean(name) > 0, self.mean(name)))

    def __str__(self) -> str:
        each = ", ".join(f"{n}: {f.kind}" for n, f in self.layers.items())
        return f"{self.kind} frame; by layer {each}"


class ReferenceFrames(Method):
    """Whether the tokens that draw attention are one, several, or a text's two ends: a model's frame of reference."""

    paper = Paper(
        "P225",
        "What are you sinking? A geometric approach on attention sink",
        "Valeria Ruscio, Umberto Nanni, Fabrizio Silvestri",
        2025,
        "2508.02546",
        "NeurIPS 2025",
        differs=(
            "The authors' full text was not at hand: the three frames follow its abstract, the legend of its figure "
            "and summaries of it, and the share from which on a token is a point of reference is ours.",
            "A frame is told from what each token receives. The spectrum of the graph of attention, its topology, and "
            "the analyses of values and of Fisher information are not here.",
            "Texts of fewer than three tokens have nothing between their ends and are not counted. A text may come in "
            "several calls, each going on where the last one ended; decoding steps are not counted.",
        ),
    )
    # of all attention in a text, from which on a token is a point of reference
    share: Annotated[float, Interval(gt=0, le=0.5)] = 0.1

    @classmethod
    def example(cls) -> ReferenceFrames:
        return cls(share=0.2)

    def idle(self, call: Call) -> bool:
        return call.cross or call.phase is Phase.DECODE

    @sums("received")
    def refer(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.received is None:
            return None
        received = call.keys.by_position(pattern.received.mean(1, keepdim=True).double())[:, 0]  # [b k]
        rows = call.is_text.sum(-1).expand(len(received), 1)
        text = added(call, "frame", received=received, rows=rows)
        if text is None:
            return None
        before, now = text
        return Sum.of(self._counted(**now) - (0 if before is None else self._counted(**before)))

    def _counted(self, received: Tensor, rows: Tensor) -> Tensor:
        """Texts, how many have each frame, and sums of what ends and middles draw and of centralisation."""
        counts = rows[:, 0] >= 3
        given = received / received.sum(-1, keepdim=True).clamp(min=1e-9)
        place = torch.arange(given.shape[-1], device=given.device)
        end = (rows - 1).clamp(min=0)
        first, last = given[:, 0], given.gather(-1, end)[:, 0]
        between = given.where((place > 0) & (place < end), 0.0).amax(-1)
        drawing = (given >= self.share).sum(-1)
        both = (first >= self.share) & (last >= self.share)
        kinds = (drawing == 1, both, (drawing > 1) & ~both, drawing == 0)
        star = (rows[:, 0] * given.amax(-1) - 1) / (rows[:, 0] - 1).clamp(min=1)
        each = torch.stack([torch.ones_like(first), *kinds, first, last, between, star], -1)
        return each[counts].sum(0)

    def answer(self, readings: Readings) -> Frames:
        found = {}
        for layer, stat in readings.items():
            texts, *each = stat.value.tolist()
            if texts:
                shares = [x / texts for x in each]
                found[layer] = Frame(texts, dict(zip(FRAMES, shares, strict=False)), *shares[len(FRAMES) :])
        return Frames(found, self.share)

    def describe(self, answer: Frames) -> Description:
        layers = answer.layers
        if not layers:
            return Description()
        ends = {"first token": "first", "last token": "last", "highest between": "between"}
        what = "The share of all attention in a text that its ends draw, and the token between them that draws most."
        drawn = Curves(
            "frame_ends", "Points of reference", what, list(layers),
            {name: torch.tensor([getattr(f, key) for f in layers.values()]) for name, key in ends.items()},
            "layer", "share of attention",
        )  # fmt: skip
        what = (
            f"The share of texts in which one token draws {percent(answer.share)} of attention or more (centralised), "
            "both ends do (bidirectional), several others (distributed), or none."
        )
        kinds = {kind: torch.tensor([f.kinds[kind] for f in layers.values()]) for kind in FRAMES}
        frames = Curves("frames", "Frames of reference", what, list(layers), kinds, "layer", "share of texts")
        if answer.kind == NONE:
            text = f"No frame of reference: no token draws {percent(answer.share)} of the attention in a text."
            return Description((drawn, frames), findings=(Finding(text, 0.1, shows="frame_ends"),))
        text = (
            f"The frame of reference is {answer.kind}: over layers the first token draws "
            f"{percent(answer.mean('first'))} of attention and the last one {percent(answer.mean('last'))}; "
            f"{percent(1 - answer.mean(NONE))} of texts have some frame in a layer."
        )
        return Description((drawn, frames), findings=(Finding(text, 0.4, shows="frame_ends"),))


if __name__ == "__main__":
    from heedful import attach, models

    text = "The sun rises in the east and sets in the west. " * 5
    for load in (models.default, models.encoder):
        model, tokenizer, _ = load()
        with torch.no_grad(), attach(model, ReferenceFrames()) as run:
            run(**tokenizer(text, return_tensors="pt"))
            print(run[ReferenceFrames()])
