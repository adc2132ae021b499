"""score = sum_image A_qk (1 - H(A_q over the image) / ln n): weight on the image's n tokens times its concentration."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.figures import (
    Curves,
    Description,
    Finding,
    Head,
    HeadMap,
    Listing,
    Role,
    counted,
    head_name,
    layers_from,
    percent,
)
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.positions import spread_heads
from heedful.core.ranges import ProperShare, RoleName
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean, Statistic

SHOWN = 10


@dataclass(frozen=True, eq=False)
class Looks:
    """How heads look at a span, `[layers h]` each, in the order of `layers`; nan where a layer has no such head."""

    layers: tuple[int, ...]
    weight: Tensor = field(repr=False)  # the share of a query's attention that goes to the span
    concentration: Tensor = field(repr=False)  # 0: evenly over the span, 1: on one of its tokens
    score: Tensor = field(repr=False)  # their product
    least: float

    @property
    def ranked(self) -> dict[Head, float]:
        """All heads by their score, highest first."""
        there = (~self.score.isnan()).nonzero().tolist()
        each = {(self.layers[n], h): float(self.score[n, h]) for n, h in there}
        return dict(sorted(each.items(), key=lambda head: -head[1]))

    @property
    def heads(self) -> dict[Head, float]:
        """Those that look hard at some of the span."""
        return {head: score for head, score in self.ranked.items() if score >= self.least}

    def __str__(self) -> str:
        top = ", ".join(f"{head_name(*head)} {score:.2f}" for head, score in list(self.ranked.items())[:SHOWN])
        return f"{counted(len(self.heads), 'head')} of score {self.least:g} or more; highest {top}"


class VisualHeads(Method):
    """Heads that give an image, or another named span, much of their attention and few of its tokens most of that.

    Queries behind the span count, or all outside it where tokens see what comes later; `.when("decode")` counts those
    of written tokens alone, as the authors do.
    """

    paper = Paper(
        "P150",
        "Unveiling Visual Perception in Language Models: An Attention Head Analysis Approach",
        "Jing Bi, Junjia Guo, Yunlong Tang, Lianggong Bruce Wen, Zhang Liu, Chenliang Xu",
        2024,
        "2412.18108",
        "CVPR 2025",
        differs=(
            "The authors' full text was not at hand, and the code that they released records attention and no score: "
            "that concentration is made of entropy, and the score of it and the weight, follows summaries.",
            "Concentration is one less entropy over the highest that it could be, of a query's weights on the span "
            "alone, and a query that gives the span nothing has none. Score is the mean over queries of the products.",
            "The score from which on a head is called visual is ours.",
            "All queries behind the span count while a prompt is read; the authors' are of the tokens written.",
        ),
    )
    one_text = True
    role: RoleName = "image"  # the name of the span
    least: ProperShare = 0.1  # score of a visual head

    def idle(self, call: Call) -> bool:
        return call.cross or self.role not in call.roles

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Statistic:
        b, h, r, _ = weights.shape
        rows = call.is_text & ~spread_heads(call.marked_queries(self.role), h)
        if call.mask.causal:
            stops = [max((stop for _, stop in region), default=0) for region in call.regions(self.role)]
            rows = rows & (spread_heads(call.q_pos, h) >= torch.tensor(stops, device=rows.device)[:, None, None])
        rows = rows.expand(b, h, r)
        span = spread_heads(call.marked(self.role), h)[:, :, None]  # [b|1 h|1 1 k]
        given = weights.detach().double() * span
        weight = given.sum(-1)
        entropy = torch.special.entr(given / weight[..., None].clamp(min=1e-30)).sum(-1)
        most = span.sum(-1).clamp(min=2).double().log()
        concentration = torch.where(weight > 0, 1 - entropy / most, 0.0)
        each = torch.stack([weight, concentration, weight * concentration], -1)
        return Mean.of((each * rows[..., None]).sum((0, 2)), rows.sum((0, 2))[:, None])  # [h 3]

    def answer(self, readings: Readings) -> Looks:
        found = pad_sequence([stat.value for stat in readings.values()], True, float("nan"))
        weight, concentration, score = found.unbind(-1)
        return Looks(tuple(readings), weight, concentration, score, self.least)

    def describe(self, answer: Looks) -> Description:
        name, ranked = self.role, list(answer.ranked.items())
        if not ranked:  # no query stands behind the span
            return Description()
        maps = (
            HeadMap(
                f"{name}_heads", f"Heads that look at the {name}",
                f"Weight on {name} tokens times its concentration: high where a head looks hard at some of them.",
                answer.layers, answer.score, "score", low=0.0,
            ),
            HeadMap(
                f"{name}_concentration", f"Concentration within the {name}",
                f"0 where a head spreads its weight on {name} tokens evenly, 1 where one of them has all of it.",
                answer.layers, answer.concentration, "score", low=0, high=1,
            ),
        )  # fmt: skip
        lines = {"weight": answer.weight.nanmean(1), "concentration": answer.concentration.nanmean(1)}
        lines["score"] = answer.score.nanmean(1)
        what = f"Weight on {name} tokens, its concentration and the product, means over heads."
        curves = Curves(f"{name}_depth", f"Looking at the {name} by layer", what, answer.layers, lines, "layer", "")
        at = {layer: n for n, layer in enumerate(answer.layers)}
        rows = [
            (head_name(*head), f"{score:.2f}", percent(float(answer.weight[at[head[0]], head[1]])),
             f"{float(answer.concentration[at[head[0]], head[1]]):.2f}")
            for head, score in ranked[:SHOWN]
        ]  # fmt: skip
        listing = Listing(
            f"{name}_best", f"Heads that look hardest at the {name}", "The heads of the highest scores.",
            ("head", "score", "weight", "concentration"), rows,
        )  # fmt: skip
        heads = answer.heads
        what = f"Gives {name} tokens much of its attention, and few of them most of that."
        part = Role(f"{name} head", what, heads, "score")
        if not heads:
            text = f"No head looks hard at some of the {name}: the highest score is {ranked[0][1]:.2f}."
            return Description((*maps, curves, listing), (part,), (Finding(text, 0.1, shows=f"{name}_heads"),))
        layers = sorted({layer for layer, _ in heads})
        text = (
            f"{counted(len(heads), 'head')} of {len(ranked)} look hard at some of the {name}, in "
            f"{layers_from(layers[0], layers[-1])}; most does {head_name(*ranked[0][0])}, with a score of "
            f"{ranked[0][1]:.2f}."
        )
        return Description((*maps, curves, listing), (part,), (Finding(text, 0.5, ("Patch",), f"{name}_heads"),))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("Read this. " + "The sun rises in the east. " * 20 + "Where does it rise?", return_tensors="pt")
    method = VisualHeads("context")
    with torch.no_grad(), attach(model, method, roles={"context": ((3, 140),)}) as run:
        run(**text)
        print(run[method])
