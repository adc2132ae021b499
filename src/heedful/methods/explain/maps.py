"""M = x W_V W_O U over pairs of tokens: how often t stands among the k highest (or lowest) that a head makes of s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Description, Finding, HeadMap, Role, head_name, percent
from heedful.core.fitted import Fitted
from heedful.core.kinds.weights import Weights
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt, PositiveShare
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat, Statistic

SPREAD = 100  # tokens that the default operation, copying, is scored on


class MAPS(Weights):
    """How strongly each head maps each source token to its target, or away from it, from weights: `fit(it, model, ())`.

    Without pairs the operation is copying: tokens spread over the vocabulary, each to itself.
    """

    paper = Paper(
        "P140",
        "Inferring Functionality of Attention Heads from their Parameters",
        "Amit Elhelo, Mor Geva",
        2024,
        "2412.11965",
        "ACL 2025",
        differs=(
            "A token that stands level with the target does not push it out of the k; the authors' sort breaks ties.",
            "Tokens always pass the first feed-forward part on their way to later layers; the authors leave it out "
            "for Llama 3.1 70B.",
            "Copying is scored on tokens spread over the vocabulary where no pairs are given; the authors take words.",
            "The share from which on a head is said to do the operation is ours.",
            "The most amplified tokens of a head, which the authors let a language model describe, are not here.",
        ),
    )
    # what is fitted: "score.<layer>" and "suppression.<layer>", each [h]
    pairs: tuple[
        tuple[NonNegativeInt, NonNegativeInt], ...
    ] = ()  # token ids: source, target; none: each of 100 tokens to itself
    name: str = "copying"  # of the operation, for figures
    # the authors': 1 for copying, 10 for the rest; 3 and 25 where a vocabulary is as large as Llama 3's
    k: PositiveInt = 1
    does: PositiveShare = 0.2  # share of the pairs from which on a head is said to do the operation

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]] = ()) -> Self:
        words = context.vocabulary()
        size = min(len(words.embedding), len(words.unembedding))
        pairs = self.pairs or tuple((i, i) for i in torch.linspace(0, size - 1, min(size, SPREAD)).long().tolist())
        if (most := max(map(max, pairs))) >= size:
            raise FieldError(self, "pairs", most, f"must hold ids below {size}, the tokens of the model", size - 1)
        source, target = torch.tensor(pairs, device=words.embedding.device).T
        x, out = words.embedding[source], words.unembedding.float()
        moved = _first_layer(context, x)
        found: dict[str, Tensor] = {}
        for layer in context.layers:
            weights = context.weights(layer.number)
            given = (x if layer.number == 0 else moved).float()
            values = torch.einsum("pe,gde->pgd", given, weights.v.float())
            values = values.repeat_interleave(weights.heads // weights.kv_heads, 1)  # [p h d]
            ranks = [_ranks(values[:, h] @ weights.o[:, h].float().T @ out.T, target) for h in range(weights.heads)]
            shares = (torch.stack(ranks, -1) < self.k).double().mean(1)  # [2 h]
            found |= {f"score.{layer.number}": shares[0], f"suppression.{layer.number}": shares[1]}
        return replace(self, fitted=Fitted(found))

    @property
    def scores(self) -> Tensor:
        """The share of pairs that each head maps, `[layers h]`."""
        return self._map("score")

    @property
    def suppression(self) -> Tensor:
        """The share of pairs whose target each head pushes down, `[layers h]`."""
        return self._map("suppression")

    def _map(self, part: str) -> Tensor:
        layers = sorted(int(key.rpartition(".")[2]) for key in self.found if key.startswith(f"{part}."))
        return pad_sequence([self.found[f"{part}.{n}"] for n in layers], True, float("nan"))

    def describe(self) -> Description:
        scores, down = self.scores, self.suppression
        each = {(n, h): x for n, row in enumerate(scores.tolist()) for h, x in enumerate(row) if x == x}
        heads = dict(sorted(each.items(), key=lambda item: -item[1]))
        does = {head: share for head, share in heads.items() if share >= self.does}
        best, share = next(iter(heads.items()))
        layers = range(len(scores))
        what = f"The share of {self.name} pairs whose target is among the {self.k} that the head's weights raise most."
        text = (
            f"By its weights head {head_name(*best)} does {self.name} for {percent(share)} of pairs, more than any "
            f"other; {len(does)} of {len(heads)} heads do it for {percent(self.does)} or more."
        )
        return Description(
            (
                HeadMap(f"maps-{self.name}", f"Heads that do {self.name}", what, layers, scores, low=0, high=1),
                HeadMap(
                    f"maps-not-{self.name}", f"Heads that undo {self.name}", what.replace("raise", "lower"),
                    layers, down, low=0, high=1,
                ),
            ),
            (Role(f"does {self.name}", what, does),),
            (Finding(text, 0.3, ("Patch",)),),
        )  # fmt: skip


def _ranks(logits: Tensor, target: Tensor) -> Tensor:
    """How many tokens stand above each target, and how many below, `[2 p]`, from `[p v]`."""
    own = logits.gather(1, target[:, None])
    return torch.stack([(logits > own).sum(1), (logits < own).sum(1)])


class _Alone(Method):
    """Puts tokens in place of a text's own and takes attention away."""

    rows: Fitted | None = None  # "x" [b 1 e]

    @at(Site.EMBEDDING)
    def put(self, embedding: Tensor, call: Call) -> Tensor:
        return embedding if self.rows is None else self.rows["x"].to(embedding)

    @at(Site.OUTPUT)
    def silence(self, output: Tensor, call: Call) -> Tensor:
        return torch.zeros_like(output)

    @reads(Site.RESIDUAL)
    def keep(self, residual: Tensor, call: Call) -> Statistic:
        return Cat.of("residual", residual)

    def answer(self, readings: Readings) -> Tensor:
        return readings[0].value[0][:, 0]


@torch.no_grad()
def _first_layer(context: FitContext, x: Tensor) -> Tensor:
    """What the first layer adds to tokens `[p e]` without attention: its feed-forward part, norms and all."""
    part = _Alone(Fitted({"x": x[:, None]})).on(layers=0)
    with context.attach(part) as run:
        run(input_ids=torch.zeros(len(x), 1, dtype=torch.long, device=x.device))
        return run[part] - x


if __name__ == "__main__":
    from heedful import fit, models

    model, tokenizer, _ = models.default()
    words = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Russia", "Moscow")]
    pairs = tuple((tokenizer(f" {a}").input_ids[0], tokenizer(f" {b}").input_ids[0]) for a, b in words)
    for finding in fit(MAPS(pairs, "capital of a country", k=10), model, ()).describe().findings:
        print(finding.text)
