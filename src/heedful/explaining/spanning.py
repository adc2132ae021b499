"""Where a text falls into spans whose tokens look at one another: triangles of a map along its diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heedful.core.asked import asks
from heedful.core.errors import FieldError
from heedful.core.figures import printed
from heedful.core.kinds.loaded import Tokenizer
from heedful.core.paper import Paper
from heedful.explaining.attention_patterns import patterns
from heedful.models import Loaded

PAPER = Paper(
    "P080",
    "Ltri-LLM: Streaming Long Context Inference for LLMs with Training-Free Dynamic Triangular Attention Pattern",
    "Hongyin Tang, Di Xiu, Lanrui Wang, Xiurui Geng, Jingang Wang, Xunliang Cai",
    2024,
    "2412.04757",
    differs=(
        "The authors' full text was not at hand: the score is read off another's code that follows it.",
        "Spans share no token, and what no span holds is one of its own; the authors let spans overlap by a part.",
        "What a pair must pay is the mean weight of pairs as near as the longest span is long, unless it is given. "
        "Only a token and itself or one before it are a pair; in that code those that a causal map leaves out pay too.",
        "Spans alone: their index vectors, their retrieval and the streaming are not here.",
    ),
)


@dataclass(frozen=True, eq=False)
class Spans:
    """Places `(start, stop)` of a text, one behind the other and nothing between them, and their scores."""

    tokens: list[str]
    places: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]  # 0 for what no triangle holds

    def __len__(self) -> int:
        return len(self.places)

    @property
    def texts(self) -> list[str]:
        return ["".join(self.tokens[start:stop]) for start, stop in self.places]

    def __str__(self) -> str:
        rows = zip(self.places, self.scores, self.texts, strict=True)
        return "\n".join(f"{start:4}-{stop - 1:<4}{score:8.2f}  {text!r}" for (start, stop), score, text in rows)

    def _repr_html_(self) -> str:
        return printed(self)


@asks
def spans(
    model: nn.Module | Loaded,
    text: str | Tensor | Mapping[str, Any],
    *,
    layer: int = 0,
    tokenizer: Tokenizer | None = None,
    longest: int = 64,
    price: float | None = None,
) -> Spans:
    """The spans of a text in the map of one layer, all heads together.

    A span is worth what its tokens give those before them in it, also where they see those behind, less the `price` of
    each pair; the best is taken, then the best that shares no token with it, and so on. None of these is longer than
    `longest` tokens; what lies between is a span of no worth. Other layers see other spans.
    """
    if longest < 2:
        raise FieldError("spans()", "longest", longest, "must be 2 tokens or more", 64)
    shown = patterns(model, text, tokenizer=tokenizer)
    if shown.maps and layer not in shown.maps:
        raise FieldError("spans()", "layer", layer, f"must be one of {list(shown.maps)}", next(iter(shown.maps)))
    weights = shown[layer].sum(0)
    if weights.shape[0] != weights.shape[1]:
        raise FieldError("spans()", "layer", layer, "looks at another text than its own", 0)
    places, scores = cut(weights, longest, price)
    return Spans(shown.tokens or [f"{i} " for i in range(len(weights))], places, scores)


def cut(
    weights: Tensor, longest: int, price: float | None = None
) -> tuple[tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Of a map `[n n]`, spans from the first token to the last, and their scores."""
    n = len(weights)
    longest = min(longest, n)
    apart = torch.arange(n)[:, None] - torch.arange(n)
    near = (apart >= 0) & (apart < longest)
    x = weights.double().cpu()
    pay = float(x[near].mean()) if price is None else price
    total = torch.zeros(n + 1, n + 1, dtype=torch.double)
    total[1:, 1:] = ((x - pay) * near).cumsum(0).cumsum(1)
    ends = torch.arange(n + 1)
    # of tokens from a up to b: a rectangle of sums, of which the half above the diagonal is nothing
    worth = total.diagonal() - total - total.mT + total.diagonal()[:, None]  # [a b]
    length = ends - ends[:, None]
    worth = worth.masked_fill((length < 2) | (length > longest), -torch.inf)
    found: list[tuple[tuple[int, int], float]] = []
    while bool((worth > 0).any()):
        start, stop = divmod(int(worth.argmax()), n + 1)
        found.append(((start, stop), float(worth[start, stop])))
        worth = worth.masked_fill((ends[:, None] < stop) & (ends > start), -torch.inf)
    filled, last = [], 0
    for (start, stop), score in [*sorted(found), ((n, n), 0.0)]:
        if start > last:
            filled.append(((last, start), 0.0))
        if stop > start:
            filled.append(((start, stop), score))
        last = stop
    return tuple(place for place, _ in filled), tuple(score for _, score in filled)
