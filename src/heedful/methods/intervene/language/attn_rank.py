"""The k-th most relevant item goes to the slot s of the k-th highest a_s, the mean attention to s, items shuffled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, RoleName
from heedful.core.sites import Site, reads
from heedful.core.stats import Mean
from heedful.kit.batches import read

_PAPER = Paper(
    "P101",
    "Attention Basin: Why Contextual Position Matters in Large Language Models",
    "Zihao Yi, Delong Zeng, Zhenqing Ling, Haohao Luo, Zhe Xu, Wei Liu, Jian Luan, Wanxia Cao, Ying Shen",
    2025,
    "2508.05128",
    "ACL 2026",
    differs=(
        "The authors' full text and code were not at hand: what is read of a prompt follows their abstract and "
        "another's account of it, by which attention is read in one of the first layers; here it is the mean of all "
        "layers, or that of `layer`.",
        "Attention to an item is that of all tokens after the last one, heads averaged, summed over its tokens.",
        "How relevant an item is, is the caller's to say: items come in that order, as a retriever gives them.",
    ),
)


class _SlotAttention(Method):
    """What the tokens behind the last span of a role give each of its spans, heads averaged."""

    role: str

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Mean:
        spans, place = call.region(self.role), call.pairs.k[..., 0, :]  # [b|1 h|1 k]
        asking = weights[:, :, call.q_pos[0, 0] >= spans[-1][1]]
        given = [(asking * ((place >= a) & (place < b))[..., None, :]).sum() for a, b in spans]
        return Mean.of(torch.stack(given), asking[..., 0].numel())

    def answer(self, readings: Readings) -> Tensor:
        """`[layers slots]`."""
        return torch.stack(readings.values_by_layer)


class AttnRank(Tokens):
    """Puts the most relevant items of a prompt into the slots that the model attends to most, whatever stands there.

    `fit` takes prompts of one text each, "input_ids" `[1 n]` with "roles", whose items stand in random order before a
    question. A prompt to be arranged has its items in the order of their relevance, the most relevant first. Let all
    begin with words of their own: a model parks attention on a text's first token, and it would count for a slot.
    """

    paper = _PAPER
    role: RoleName = "documents"  # the role that names the items' spans
    layer: NonNegativeInt | None = None  # the layer whose attention a fit reads; None: the mean of all
    attention: tuple[float, ...] = ()  # what each slot gets, from a fit

    @classmethod
    def example(cls) -> AttnRank:
        return cls(attention=(0.2, 0.1, 0.3))

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        items = len(prompt.spans(self.role))
        if items != len(self.attention):
            rule = f"must hold the attention to each of {items} slots, from a fit to prompts of {items} items"
            raise FieldError(self, "attention", self.attention, rule, "heedful.fit(AttnRank(), model, batches)")
        best = sorted(range(items), key=lambda slot: -self.attention[slot])
        return prompt.reordered(self.role, tuple(best.index(slot) for slot in range(items)))

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> AttnRank:
        found = []
        for batch in batches:
            ids, spans = batch.get("input_ids"), tuple(batch.get("roles", {}).get(self.role, ()))
            if ids is None or not spans or len(ids) != 1 or ids.shape[1] <= spans[-1][1]:
                rule = f"must be prompts, each one text with spans of {self.role!r} in 'roles' and tokens behind them"
                good = [{"input_ids": "[1 20]", "roles": {self.role: ((0, 8), (8, 16))}}]
                raise FieldError(self, "batches", [*batch] if ids is None else (tuple(ids.shape), spans), rule, good)
            prompt = {"input_ids": ids, "roles": batch["roles"]}
            found.append(read(context, _SlotAttention(self.role), [prompt]))
        if len({each.shape for each in found}) != 1:
            rule = "must be one prompt or more, all of as many items"
            raise FieldError(self, "batches", [x.shape[1] for x in found], rule, "20 prompts of 8 items")
        mean = torch.stack(found).mean(0)
        if self.layer is not None and self.layer >= len(mean):
            raise FieldError(self, "layer", self.layer, f"must be below {len(mean)}, the model's layers", 1)
        chosen = mean.mean(0) if self.layer is None else mean[self.layer]
        return replace(self, attention=tuple(chosen.tolist()))


if __name__ == "__main__":
    import random

    from heedful import arrange, fit, models

    model, tokenizer, _ = models.default()
    facts = ["The secret word is walnut.", "The lamp is green.", "Trains run every hour.", "The dog sleeps."]

    def asked(order: list[str]) -> Prompt:
        tokens: list[int] = tokenizer("Some facts.\n").input_ids
        spans = []
        for fact in order:
            piece = tokenizer(f"{fact}\n").input_ids
            spans.append((len(tokens), len(tokens) + len(piece)))
            tokens += piece
        tokens += tokenizer("Question: what is the secret word?\nAnswer: the secret word is").input_ids
        return Prompt(tuple(tokens), {"documents": tuple(spans)})

    shuffled = [asked(random.Random(seed).sample(facts, len(facts))) for seed in range(4)]
    ranked = fit(AttnRank(), model, [{"input_ids": torch.tensor([x.tokens]), "roles": x.roles} for x in shuffled])
    print(ranked)
    print(tokenizer.decode(arrange(model, asked(facts), ranked).tokens))
