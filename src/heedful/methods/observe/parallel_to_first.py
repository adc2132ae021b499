"""cos(x_t, x_0) of the residual stream after each layer, for every token t of a text but the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, Grid, layers_from
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import ProperShare
from heedful.core.sites import Site, reads
from heedful.core.stats import Histogram, Statistic


@dataclass(frozen=True, eq=False)
class Parallels:
    """How parallel the tokens of a text run to its first one, by layer."""

    spread: Mapping[int, Tensor] = field(repr=False)  # [bins]: tokens by cosine
    edges: tuple[float, ...] = field(repr=False)
    near: float

    def near_share(self, layer: int) -> float:
        """The share of tokens, but for first ones, that are near-parallel to the first."""
        counts = self.spread[layer]
        return float(counts[self.edges.index(self.near) :].sum() / counts.sum())

    def mean(self, layer: int) -> float:
        """The mean cosine, each token taken at the middle of its bin."""
        counts, edges = self.spread[layer], torch.tensor(self.edges, dtype=torch.float64)
        return float((counts * (edges[1:] + edges[:-1]) / 2).sum() / counts.sum())

    @property
    def near_layers(self) -> list[int]:
        """The layers after which some token is near-parallel."""
        return [n for n in self.spread if self.near_share(n) > 0]

    def __str__(self) -> str:
        shares = ", ".join(f"{n}: {self.near_share(n):.2%}" for n in self.near_layers)
        return f"tokens with cosine {self.near:g} or more to the first, by layer {shares or 'none'}"


class ParallelToFirst(Method):
    """Which tokens take on the direction of the first one, as sinks in the middle of a text do."""

    paper = Paper(
        "P281",
        "Mitigating Attention Sinks and Massive Activations in Audio-Visual Speech Recognition with LLMs",
        "Anand, Umberto Cappellazzo, Stavros Petridis, Maja Pantic",
        2025,
        "2510.22603",
        differs=(
            "The measure alone, on any model; the loss with which the authors drive the cosine down is not here.",
            "The authors show the cosine and name no threshold; the one here is that of Secondary Sinks (P032).",
            "Cosines are counted in bins of 0.05, so that texts add up.",
        ),
    )
    one_text = True
    near: ProperShare = 0.9  # cosine from which on a token counts as parallel to the first

    @property
    def edges(self) -> tuple[float, ...]:
        return tuple(sorted({i / 20 for i in range(-20, 21)} | {self.near}))

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    @reads(Site.RESIDUAL)
    def compare(self, stream: Tensor, call: Call) -> Statistic | None:
        is_text, position = (x[:, 0].expand(len(stream), -1) for x in (call.is_text, call.q_pos))
        first = (position == 0) & is_text
        if not bool(first.any()):
            return None  # a later piece of a text, whose first token is not at hand
        stream = stream.detach()
        lead = stream[torch.arange(len(stream), device=stream.device), first.int().argmax(-1)]  # [b e]
        cosine = (stream @ lead[..., None])[..., 0] / (stream.norm(dim=-1) * lead.norm(dim=-1, keepdim=True))
        others = is_text & ~first & first.any(-1, keepdim=True)
        return Histogram.of(cosine[others], self.edges)

    def answer(self, readings: Readings) -> Parallels:
        return Parallels({n: stat.value for n, stat in readings.items()}, self.edges, self.near)

    def describe(self, answer: Parallels) -> Description:
        layers = list(answer.spread)
        grid = Grid(
            "parallel_spread",
            "Direction of tokens against the first token",
            "For each layer, how many tokens lie at which cosine to the text's first token; those at the right edge "
            "have taken on its direction.",
            values=torch.stack([answer.spread[n] / answer.spread[n].sum() for n in layers]),
            rows=[str(n) for n in layers],
            columns=[f"{edge:g}" for edge in answer.edges[:-1]],
            row_label="layer",
            column_label="cosine to the first token, from",
            unit="share",
            folded=True,
        )
        curves = Curves(
            "parallel_share",
            "Tokens parallel to the first",
            f"The share of tokens with a cosine of {answer.near:g} or more to the first token: candidates for sinks in "
            "the middle of the text.",
            x=layers,
            lines={"share of tokens": torch.tensor([answer.near_share(n) for n in layers])},
            x_label="layer",
            y_label="share",
            folded=True,
        )
        where = answer.near_layers
        if not where:
            return Description((grid, curves))
        top = max(where, key=answer.near_share)
        text = (
            f"After {layers_from(where[0], where[-1])} some tokens point the same way as the first token, most of them "
            f"after layer {top} ({answer.near_share(top):.2%} of tokens)."
        )
        return Description((grid, curves), findings=(Finding(text, 0.3, shows="parallel_share"),))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 5, return_tensors="pt")
    with attach(model, ParallelToFirst()) as run:
        run(**text)
        print(run[ParallelToFirst()])
