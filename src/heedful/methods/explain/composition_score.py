"""|M u_i| / |M|, with W_O W_V = sum_i s_i u_i v_i' of one head and M what a later one multiplies the stream with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.figures import Description, Finding, Head, HeadMap, Listing, head_name
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import HeadWeights, Weights
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt

SIDES = ("queries", "keys", "values")


@dataclass(frozen=True)
class Channel:
    """One direction that `writer` writes, and how much of what `reader` reads a side by lies along it."""

    writer: Head
    component: int  # 0 is the largest singular value
    reader: Head
    side: str
    score: float

    def __str__(self) -> str:
        return f"{head_name(*self.writer)}/{self.component} -> {head_name(*self.reader)} {self.side}: {self.score:.3f}"


class CompositionScore(Weights):
    """Through which directions earlier heads speak to later ones, from the weights alone: `fit(it, model, ())`.

    A direction at random scores 1 / sqrt(width of the stream).
    """

    paper = Paper(
        "P029",
        "Talking Heads: Understanding Inter-layer Communication in Transformer Language Models",
        "Jack Merullo, Carsten Eickhoff, Ellie Pavlick",
        2024,
        "2406.09519",
        "NeurIPS 2024",
        differs=(
            "The authors' full text was not at hand, and their repository holds no code: the score is the known "
            "composition score, taken for each singular vector as summaries of the paper tell it.",
            "Norms' scales are not folded into the projections, and biases are left out.",
            "With rotary embedding a query and a key meet as if they stood at one place: W_Q' W_K without the turn.",
            "Each pair of heads keeps the score of its best component and of the whole; the authors plot all of them.",
            "The edits of the model along a channel, and the Laundry List, are not here.",
        ),
    )
    # what is fitted, over all heads in a row: "heads" [n 2] (layer and head); by side "best" and "whole" [n n], reader
    # by writer and 0 unless the writer's layer is earlier, and "component" [n n]
    shown: PositiveInt = 20  # strongest channels to list

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> Self:
        layers = [context.weights(layer.number) for layer in context.layers]
        heads = [(n, h) for n, w in enumerate(layers) for h in range(w.heads)]
        starts = [sum(w.heads for w in layers[:n]) for n in range(len(layers) + 1)]
        written = [_written(w) for w in layers]
        found = {"heads": torch.tensor(heads)}
        for side in SIDES:
            best, whole = torch.zeros(2, len(heads), len(heads))
            component = torch.zeros(len(heads), len(heads), dtype=torch.int32)
            for n, weights in enumerate(layers):
                read = _reading(weights, side)
                read = read / read.flatten(1).norm(dim=1)[:, None, None]
                for m, (u, s) in enumerate(written[:n]):
                    scores = torch.einsum("hde,wei->hwdi", read, u).norm(dim=2)  # [readers writers components]
                    at = slice(starts[n], starts[n + 1]), slice(starts[m], starts[m + 1])
                    high = scores.max(-1)
                    best[at], component[at] = high.values.cpu(), high.indices.cpu().int()
                    whole[at] = ((scores * s).norm(dim=-1) / s.norm(dim=-1)).cpu()
            found |= {f"best.{side}": best, f"whole.{side}": whole, f"component.{side}": component}
        return replace(self, fitted=Fitted(found))

    def between(self, side: str, whole: bool = False) -> Tensor:
        """The score of each pair's best component, or of the whole head: `[n n]`, reader by writer, heads in a row."""
        if side not in SIDES:
            raise FieldError(self, "side", side, f"must be one of {SIDES}", "keys")
        return self.found[f"{'whole' if whole else 'best'}.{side}"]

    def channels(self, count: int, side: str | None = None, reader: Head | None = None) -> list[Channel]:
        """The strongest channels, of one side or into one head alone where that is asked for."""
        heads = [(n, h) for n, h in self.found["heads"].tolist()]
        if reader is not None and reader not in heads:
            raise FieldError(self, "reader", reader, f"must be (layer, head) of {len(heads)} heads", heads[-1])
        rows = range(len(heads)) if reader is None else [heads.index(reader)]
        found = []
        for name in SIDES if side is None else (side,):
            best, component = self.between(name), self.found[f"component.{name}"]
            flat = best[list(rows)].flatten()
            for at in flat.argsort(descending=True, stable=True)[:count].tolist():
                r, w = rows[at // len(heads)], at % len(heads)
                if heads[w][0] < heads[r][0]:
                    found.append(Channel(heads[w], int(component[r, w]), heads[r], name, float(best[r, w])))
        return sorted(found, key=lambda channel: -channel.score)[:count]

    def describe(self) -> Description:
        heads = self.found["heads"]
        layers, most = int(heads[:, 0].max()) + 1, int(heads[:, 1].max()) + 1
        maps = []
        for side in SIDES:
            values = torch.full((layers, most), float("nan"))
            values[heads[:, 0], heads[:, 1]] = self.between(side).amax(1)
            values[0] = float("nan")  # nobody speaks to the first layer
            what = f"How far one direction that an earlier head writes reaches what each head reads its {side} by."
            maps.append(HeadMap(f"composition-{side}", f"Spoken to by {side}", what, range(layers), values, "score"))
        strongest = self.channels(self.shown)
        listing = Listing(
            "channels", "Strongest channels between heads",
            "Directions that one head writes and a later one reads; component 0 is what the writer amplifies most.",
            ("writer", "component", "reader", "side", "score"),
            [(head_name(*c.writer), c.component, head_name(*c.reader), c.side, f"{c.score:.3f}") for c in strongest],
        )  # fmt: skip
        findings: tuple[Finding, ...] = ()
        if strongest:
            first = strongest[0]
            text = (
                f"By their weights head {head_name(*first.writer)} speaks most clearly to head "
                f"{head_name(*first.reader)}, which reads its {first.side} along component {first.component} of what "
                f"that writes (score {first.score:.2f})."
            )
            findings = (Finding(text, 0.3, ("Patch",)),)
        return Description((*maps, listing), findings=findings)


def _written(weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """The directions that each head writes, `[h e d]`, and how much it amplifies along each, `[h d]`, largest first."""
    o = weights.o.float().movedim(0, 1)  # [h e d]
    v = weights.v.float().repeat_interleave(weights.heads // weights.kv_heads, 0)
    left, right = torch.linalg.qr(o), torch.linalg.qr(v.mT)
    u, s, _ = torch.linalg.svd(left.R @ right.R.mT)
    return left.Q @ u, s


def _reading(weights: HeadWeights, side: str) -> Tensor:
    """What a head reads a side by, `[h d e]`: of the product's norms with any vector those that its M has."""
    q, o = weights.q.float(), weights.o.float().movedim(0, 1)
    k, v = (x.float().repeat_interleave(weights.heads // weights.kv_heads, 0) for x in (weights.k, weights.v))
    outer, inner = {"queries": (k.mT, q), "keys": (q.mT, k), "values": (o, v)}[side]
    return torch.linalg.qr(outer).R @ inner


if __name__ == "__main__":
    from heedful import fit, models

    for channel in fit(CompositionScore(), models.default().model, ()).channels(10):
        print(channel)
