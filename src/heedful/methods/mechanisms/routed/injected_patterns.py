"""Some heads see only keys that a person named: alike tokens, the own sentence, the next token, the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    Description,
    HeadMap,
    Mask,
    Mean,
    Method,
    NonNegativeInt,
    Paper,
    Readings,
    Site,
    at,
    reads,
)
from heedful.core.positions import spread_heads
from heedful.kit.chosen import Chosen
from heedful.kit.told import at_places, token_ids

PATTERNS = ("matching token", "own sentence", "next token", "token before")  # of heads 0 to 3, and again from 4 on


@dataclass(frozen=True, eq=False)
class Placed:
    """What patterns go by: token and sentence of each query `[b g|1 n]` and key `[b g|1 k]` of a whole call."""

    asking: tuple[Tensor, Tensor]
    giving: tuple[Tensor, Tensor]

    def tables(self, part: Call) -> Tensor:
        """The pairs that each pattern names, whoever may see them, of some rows of the call: `[patterns b h|1 r k]`."""

        def alike(asking: Tensor, giving: Tensor) -> Tensor:
            giving = spread_heads(giving, part.heads)[..., None, :]
            return asking[..., part.rows, None] == giving[..., part.cols]

        token, sentence = (alike(q, k) for q, k in zip(self.asking, self.giving, strict=True))
        ahead = -part.distance
        return torch.stack(torch.broadcast_tensors(token & (ahead != 0), sentence, ahead == 1, ahead == -1))


class InjectedPatterns(Method):
    """Heads take the patterns in turn, in all layers; a query to which its pattern leaves no key sees as it did.

    With `relevance` it tells how much of each head's weight falls on each pattern, which is how patterns are checked
    before they are injected: `InjectedPatterns(0, relevance=True)` in a trained model.
    """

    paper = Paper(
        "P175",
        "Human Guided Exploitation of Interpretable Attention Patterns in Summarization and Topic Segmentation",
        "Raymond Li, Wen Xiao, Linzi Xing, Lanjun Wang, Gabriel Murray, Giuseppe Carenini",
        2022,
        "2112.05364",
        "EMNLP 2022",
        differs=(
            "A sentence is all up to a token that ends it, with that token; the authors take what stands from [CLS] to "
            "[SEP], which is the same where these stand around each sentence.",
            "A head that sees one place alone is given it by the mask. Where that place is not in the text, or not to "
            "be seen, the query sees as it did; in the authors' code it looks at all places evenly.",
            "Whether a token has one alike is asked among the keys that it may see, so that the patterns hold for "
            "causal models too.",
            "Heads of alike tokens and of the own sentence weigh the places of their pattern by their scores, which is "
            "one of two ways in the authors' code; the other, even weights over them, is not part of it.",
            "Heads are given their patterns in a model's own attention, as in the authors' models without pretraining; "
            "pattern heads beside it (projected attention layers) are not added.",
        ),
    )
    heads: NonNegativeInt = 4  # of each layer, from the first on; the paper: 4 to 12 of 12
    ends: tuple[NonNegativeInt, ...] = (102,)  # tokens that end a sentence; [SEP] of the paper's models
    relevance: bool = False  # whether the heads' weight on each pattern is told

    @classmethod
    def neutral(cls) -> InjectedPatterns:
        return cls(0)

    @classmethod
    def example(cls) -> InjectedPatterns:
        return cls(ends=tuple(range(0, 100, 5)), relevance=True)

    @at(Site.MASK, when="heads")
    def inject(self, mask: Mask, call: Call) -> Mask:
        return mask & Chosen(self.chooser(mask, call, self.placed(call).tables))

    @reads(Site.MASK, when="relevance")
    def place(self, mask: Mask, call: Call) -> None:
        """Leave for tiles of the pattern what patterns go by, which only a whole call knows."""
        call.state.forward[call.name] = self.placed(call)

    def placed(self, call: Call) -> Placed:
        """Token and sentence of each query and key of a whole call."""
        ids = token_ids(call)
        end = torch.isin(ids, torch.tensor(self.ends, dtype=ids.dtype, device=ids.device)).long()
        both = (ids, end.cumsum(-1) - end)
        asking, giving = (tuple(at_places(x, places) for x in both) for places in (call.queries, call.keys))
        return Placed(asking, giving)  # type: ignore[arg-type]

    def chooser(self, mask: Mask, call: Call, tables: Callable[[Call], Tensor]) -> Callable[[slice], Tensor]:
        """Which keys `[b h r k]` rows of the call see, of those that the mask shows, by the tables of the patterns."""
        # the mask outlives the call, whose tensors need not
        places = replace(call, query=None, key=None, value=None, hidden=None, rotate=None)

        def pick(rows: slice) -> Tensor:
            part = places.tile(rows, slice(0, len(places.keys)))
            seen = mask.keeps(part.pairs)
            named = tables(part)
            if seen is not None:
                named = named & seen
            named = named | ~named.any(-1, keepdim=True)
            _, b, h, r, k = named.shape
            out = named.new_ones(b, places.heads, r, k)
            for head in range(min(self.heads, places.heads)):
                out[:, head] = named[head % len(PATTERNS), :, head if h > 1 else 0]
            return out

        return pick

    @reads(Site.PATTERN, when="relevance")
    def weigh(self, weights: Tensor, call: Call) -> Mean:
        """The share of its weight that a head gives to each pattern, `[patterns h]`: the mean over tokens."""
        placed: Placed = call.state.forward[call.name]
        share = (weights * placed.tables(call)).sum(-1) * call.is_text
        return Mean.of(share.sum((1, 3)).double(), float(call.is_text.expand(len(weights), 1, -1).sum()))

    def answer(self, readings: Readings) -> dict[str, Tensor]:
        """How relevant each pattern is to each head, `[layers h]`."""
        found = torch.stack([mean.value for mean in readings.values()], 1)
        return dict(zip(PATTERNS, found, strict=True))

    def describe(self, answer: dict[str, Tensor]) -> Description:
        maps = (
            HeadMap(
                f"relevance_{name.replace(' ', '_')}",
                f"Weight on {name}",
                f"The share of its weight that each head gives to the pattern “{name}”, the mean over tokens.",
                layers=list(range(len(values))),
                values=values,
                unit="share of weight",
                low=0.0,
                high=1.0,
            )
            for name, values in answer.items()
        )
        return Description(figures=tuple(maps))


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bert")
    inputs = models.tiny_inputs(model)
    method = InjectedPatterns(ends=tuple(range(0, 100, 5)), relevance=True)
    with attach(model, method) as run:
        print(run.difference(**inputs))
        print(run[method])
