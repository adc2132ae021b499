"""Heads that copy keep all; the others sinks, recent keys, and one token for N dropped: N exp(q mean(k)), mean(v)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError, SiteError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.positions import Positions
from heedful.core.ranges import NonNegativeInt, PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.core.stats import Statistic, Sum
from heedful.core.summary import Summary, sums
from heedful.kit.batches import at_least_one
from heedful.kit.budget import Budget, all_fit, newest, room, room_for
from heedful.kit.scores import scores_of
from heedful.methods.sparse.cache._fits import among_best

DROPPED = (
    "count",
    "key",
    "value",
)  # of what went: how much [b g 1 1], and its sums [b g 1 d] and [b g 1 v]
ROWS = 256  # queries whose scores are held at once


class RazorAttention(Method):
    """Induction and echo heads keep the whole cache; the others drop what is remote and remember its mean.

    Fit it first: `fit` takes batches of "input_ids" in which random tokens come again and again.
    """

    paper = Paper(
        "P189",
        "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        "Hanlin Tang, Yang Lin, Jing Lin, Qingsen Han, Shikuan Hong, Yiwu Yao, Gongyi Wang",
        2025,
        "2407.15891",
        "ICLR 2025",
        differs=(
            "The authors' full text was not at hand: the algorithm follows a copy of its listing, the scores and the "
            "choice of heads the code of the same company's MindSpore tools, which take the best head of a group.",
            "The first token never counts as a copy, since many heads park on it.",
            "The compensation token is added to what a head gives out: exp(q k) N stands beside the sum of the kept "
            "keys' exponents, biases that a model adds included, but its sink logits do not; the token has no bias.",
            "Only rotary models' rule is here; for ALiBi the paper draws each head's reach from its slope.",
        ),
    )
    chunk_invariant = False  # the text is read in full, and cut after each call
    budget: Budget = 0.2  # newest entries that a compressed head keeps; the paper: a fifth of the text
    least: PositiveInt = 4000  # and never fewer than so many; the paper's
    sinks: NonNegativeInt = 4  # first entries that always stay; the paper's
    induction: Share = 0.14  # share of key heads that are protected for their induction score; the paper's
    echo: Share = 0.01  # and for their echo score; the paper's
    compensation: bool = True  # the token for what was dropped
    scores: Fitted | None = None  # "induction.LAYER" and "echo.LAYER" [g]
    seed: int | None = None  # without a fit: random scores, the control

    @classmethod
    def neutral(cls) -> RazorAttention:
        return cls(induction=1.0, seed=0)

    @classmethod
    def example(cls) -> RazorAttention:
        return cls(budget=3, least=1, sinks=1, seed=0)

    def rests(self, tokens: int) -> str | None:
        room = self.sinks + max(room_for(self.budget, tokens), self.least)
        return all_fit(room, tokens, "a smaller least, with budget=0.2,")

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> RazorAttention:
        """Score heads by how much they look at earlier copies of a token, and at what followed them."""
        found: dict[int, Tensor] = {}
        for batch in at_least_one(self, batches):
            reader = _Copies(self._period(batch["input_ids"]))
            with torch.no_grad(), context.attach(reader) as run:
                run(**batch)
                for layer, score in run[reader].items():
                    found[layer] = score + found.get(layer, 0.0)
        best = {i: found[i].unflatten(0, (context.layers[i].kv_heads, -1)).amax(1) for i in found}  # [g 2]
        kinds = ("induction", "echo")
        scores = {f"{kind}.{i}": x[:, n].float() for i, x in best.items() for n, kind in enumerate(kinds)}
        return replace(self, scores=Fitted(scores))

    def _period(self, ids: Tensor) -> int:
        """After how many tokens every text comes again."""
        for period in range(2, ids.shape[1] // 2 + 1):
            if torch.equal(ids[:, period:], ids[:, :-period]):
                return period
        rule = "must hold tokens that come again after a fixed number of them, without padding"
        raise FieldError(self, "batches", tuple(ids.shape), rule, "torch.randint(9, 99, (2, 64)).repeat(1, 4)")

    def retrieving(self, call: Call) -> Tensor:
        """Which key heads of the layer keep everything, `[g]`."""
        return among_best(self, "scores", (("induction", self.induction), ("echo", self.echo)), call)

    @at(Site.HEAD_OUTPUT)
    def compensate(self, heads: Tensor, call: Call) -> Tensor:
        if not self.compensation or "count" not in call.state.cache or call.cross:
            return heads
        if call.query is None or call.key is None:
            raise SiteError(f"{self!r}, layer {call.layer}: HEAD_OUTPUT comes without the call's queries and keys")
        count, key, value = (call.state.cache[name] for name in DROPPED)
        missing = self._missing(call.keys, call)
        if bool(((missing != count) & (missing > 0)).any()):  # nothing is missing from heads that .on() spared
            rule = "the cache holds other entries than this method left there; use no other method that drops entries"
            raise SiteError(f"{self!r}, layer {call.layer}: {rule}, and crop no more than the newest")
        count = count.where(missing > 0, 0)
        count, key, value = (call.spread(x) for x in (count.float(), key, value))
        out = []
        for start in range(0, heads.shape[2], ROWS):
            rows = slice(start, min(start + ROWS, heads.shape[2]))
            part = call.tile(rows, slice(0, len(call.keys)))
            query = call.query[:, :, rows].float()
            found = scores_of(query, call.key.float(), call, rows)
            keep = call.mask.keeps(part.pairs)
            total = (found if keep is None else found.masked_fill(~keep, -torch.inf)).logsumexp(-1, keepdim=True)
            total = total.where(total > -torch.inf, torch.inf)  # a query that sees nothing gets nothing
            mean = call.capped(call.scale * (query @ (key / count.clamp(min=1)).mT))
            weight = torch.sigmoid(mean + count.log() - total)  # of the compensation token, 0 where nothing was dropped
            out.append(heads[:, :, rows] + weight * (value / count.clamp(min=1) - heads[:, :, rows]))
        return torch.cat(out, 2)

    @staticmethod
    def _missing(keys: Positions, call: Call) -> Tensor:
        """How many tokens of the text so far the cache does not hold, `[b|1 g|1 1 1]`."""
        there = keys.position >= 0
        there = there if keys.is_filled is None else there & keys.is_filled
        seen = call.q_pos.amax(-1, keepdim=True) + 1
        if (padding := call.mask.padding) is not None:
            there = there & padding.at(keys.index)
            seen = padding.text[:, None, : int(call.queries.index.max()) + 1].sum(-1, keepdim=True)
        return (seen - there.sum(-1, keepdim=True))[..., None]

    @at(Site.CACHE)
    def drop(self, entries: CachedKV, call: Call) -> Tensor:
        recent = newest(entries, call, room(self.budget, call).clamp(min=self.least))
        first = entries.positions.position < self.sinks
        keep = recent | first | self.retrieving(call)[:, None].to(recent.device)
        gone = (entries.is_text & ~keep)[..., None]
        new = (gone, *(x.float() * gone for x in (entries.key, entries.value)))
        for name, x in zip(DROPPED, new, strict=True):
            call.state.cache[name] = x.sum(-2, keepdim=True) + call.state.cache.get(name, 0)
        return entries.is_text & keep


class _Copies(Method):
    """How much weight each head gives to what followed earlier copies of a token, and to the copies, `[h 2]`."""

    period: int

    def idle(self, call: Call) -> bool:
        return call.cross

    @sums("first", "distance")
    def read(self, pattern: Summary, call: Call) -> Statistic | None:
        if pattern.behind is None or pattern.first is None:
            return None
        # the first token is no copy: many heads park on it; from query i it stands i back
        behind, p = (pattern.behind - pattern.first).sum(0), self.period
        return Sum.of(torch.stack([behind[:, p - 1 :: p].sum(-1), behind[:, p::p].sum(-1)], -1))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: statistic.value for layer, statistic in readings.items()}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    again = torch.randint(1000, 9000, (1, 40), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, fit(RazorAttention(least=32), model, [{"input_ids": again}])) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
