"""a_l = mean over queries i of sum_j A_ij over those j whose lowest common block with i, in a tree, has height l."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import Readings
from heedful.core.figures import Curves, Description, Finding, HeadMap
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean


@dataclass(frozen=True, eq=False)
class Levels:
    """Attention by height; 0 is a token itself, 1 its siblings, and the last height is all that is further."""

    layers: tuple[int, ...]
    share: Tensor = field(repr=False)  # [layers h heights]: of all attention
    even: Tensor = field(repr=False)  # [layers h heights]: what attention spread evenly would give

    @property
    def height(self) -> Tensor:
        """How high up the tree each head looks on average, `[layers h]`."""
        return self._mean(self.share)

    def _mean(self, share: Tensor) -> Tensor:
        return (share * torch.arange(share.shape[-1], dtype=share.dtype)).sum(-1)

    def __str__(self) -> str:
        means = (x.nanmean(1).tolist() for x in (self.height, self._mean(self.even)))
        rows = zip(self.layers, *means, strict=True)
        return "mean height by layer: " + ", ".join(f"{n}: {x:.2f} (even {even:.2f})" for n, x, even in rows)


class TreeLevels(Method):
    """How far up a tree of blocks each head looks: in its own pair of tokens, its four, its eight, and so on.

    It is for sequences that a tree has made, whose leaves are the tokens, and shows whether layers put them together
    from short range to long.
    """

    paper = Paper(
        "P220",
        "How Transformers Learn Structured Data: Insights from Hierarchical Filtering",
        "Jerome Garnier-Brun, Marc Mezard, Emanuele Moscato, Luca Saglietti",
        2025,
        "2408.15138",
        "ICML 2025",
        differs=(
            "The authors look at maps of attention; this adds them up by the height of what two tokens share.",
            "Their filtered trees, belief propagation, and probes for ancestors are not here.",
        ),
    )
    branching: Annotated[int, Ge(2)] = 2  # children of a node; the authors: 2
    # heights that are told apart, further ones being one; the authors: trees of depth 4
    depth: Annotated[int, Interval(ge=1, le=30)] = 4

    def idle(self, call: Call) -> bool:
        return call.cross or call.phase is Phase.DECODE

    @reads(Site.PATTERN)
    def climb(self, pattern: Tensor, call: Call) -> Mean:
        q, k = call.pairs.q, call.pairs.k
        height = torch.zeros(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.long, device=pattern.device)
        for level in range(self.depth + 1):
            height = height + (q // self.branching**level != k // self.branching**level)
        is_text = call.is_text[..., None]  # [b|1 1 r 1]
        seen = torch.ones_like(pattern) if call.keep is None else call.keep.expand(pattern.shape).to(pattern.dtype)
        seen = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        marks = [(height == n) & is_text for n in range(self.depth + 2)]
        found = torch.stack([(x * mark).sum((0, 2, 3)) for x in (pattern, seen) for mark in marks], -1)  # [h 2*heights]
        rows = is_text.expand(len(pattern), 1, pattern.shape[2], 1).sum()
        return Mean.of(found.double(), float(rows))

    def answer(self, readings: Readings) -> Levels:
        found = {n: stat.value for n, stat in readings.items() if isinstance(stat, Mean)}
        share, even = pad_sequence(list(found.values()), True, float("nan")).unflatten(-1, (2, -1)).unbind(-2)
        return Levels(tuple(found), share, even)

    def describe(self, answer: Levels) -> Description:
        what = "How high up the tree each head looks: 0 is its own token, 1 its siblings, 2 their cousins."
        heights = HeadMap("height", "Height in the tree", what, answer.layers, answer.height, "", 0, self.depth + 1)
        lines = {
            f"height {n}" if n <= self.depth else "further": answer.share[..., n].nanmean(1)
            for n in range(self.depth + 2)
        }
        what = "The share of a layer's attention that goes to tokens whose lowest common block has that height."
        curves = Curves("heights", "Attention by height", what, answer.layers, lines, "layer", "share of attention")
        mean = answer.height.nanmean(1)
        text = f"Heads look up to height {float(mean[0]):.2f} in the first layer and {float(mean[-1]):.2f} in the last."
        return Description((heights, curves), (), (Finding(text, 0.3, shows="height"),))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bert")
    with attach(model, TreeLevels()) as run:
        run(**models.tiny_inputs(model, length=16))
        print(run[TreeLevels()])
