"""Tokens of a document see in each head its own kind of mask: first tokens, own document, both, or everything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, RoleName, Share
from heedful.core.regions import Region, by_text, marked, span_of
from heedful.core.rules import Rule
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Sum
from heedful.kit.batches import read, with_roles
from heedful.methods.sparse.cache._fits import of_layer

KINDS = 3  # that narrow a mask, the narrowest first: sinks alone, the own document, both
GOOD_BATCHES = [{"input_ids": "...", "roles": {"documents": ((4, 90), (90, 180))}}]


class BlindSight(Method):
    """Heads that look past their document at its first tokens, or not at all, are spared the rest of the others.

    Documents are spans of a role, such as the images of a prompt; what stands outside them sees all and is seen by all.
    Fit it first: `fit` takes batches of the model's inputs with "roles" that mark documents.
    """

    paper = Paper(
        "P208",
        "BlindSight: Harnessing Sparsity for Efficient Vision-Language Models",
        "Tharun Adithya Srikrishnan, Deval Shah, Timothy Hein, Ahmed Hasssan, Stephen Youn, Steven K. Reinhardt",
        2025,
        "2507.09071",
        differs=(
            "Their four kinds of heads are here; of how they tell them the abstract and its reviews were at hand, by "
            "which each kind has a bar of its own, layers a factor, and a head the kind of most samples. Here a head "
            "has the narrowest mask that keeps a share of the weight of documents' tokens, in the mean of all of them.",
            "Their documents are images; here they are the spans of a role, of text or of images.",
            "A document's sinks are its first tokens; where theirs stand is told by a model's template.",
            "The mask alone; their kernel is not here.",
        ),
    )
    role: RoleName = "documents"  # the spans that some heads part
    sinks: PositiveInt = 1  # first tokens of each document that others may still see
    keep: Share = 0.9  # share of the weight that a head's mask must keep
    kept: Fitted | None = None  # "kept.LAYER" [h kinds]: the share that each narrow mask keeps
    seed: int | None = None  # without a fit: random shares, the control

    @classmethod
    def neutral(cls) -> BlindSight:
        return cls(keep=1.0, seed=0)

    @classmethod
    def example(cls) -> BlindSight:
        return cls(keep=0.4, seed=0)

    def idle(self, call: Call) -> bool:
        return call.cross or bool((self.kinds(call) == KINDS).all())

    @at(Site.MASK)
    def part(self, mask: Mask, call: Call) -> Mask:
        kinds = self.kinds(call)
        for kind, rule in enumerate(_masks(call, self.role, self.sinks)):
            if heads := (kinds == kind).nonzero().flatten().tolist():
                mask = mask & rule.on(tuple(heads), call.heads)
        return mask

    def kinds(self, call: Call) -> Tensor:
        """The first mask that keeps enough, of each head of the layer, `[h]`; behind the last one: everything."""
        found = of_layer(self, "kept", (call.heads, KINDS), call)
        shares = found if self.kept is not None else found.sigmoid()
        enough = torch.cat([shares >= self.keep, torch.ones(call.heads, 1, dtype=torch.bool)], 1)
        return enough.long().argmax(1)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> BlindSight:
        """Measure how much of the weight of documents' tokens each mask would keep in each head."""
        given = with_roles(self, batches, self.role, good=GOOD_BATCHES)
        sums = read(context, _Kept(self.role, self.sinks), given)
        if any(not bool(x[:, KINDS].all()) for x in sums.values()):
            raise FieldError(self, "batches", len(given), "must have tokens in documents", GOOD_BATCHES)
        shares = {f"kept.{layer}": (x[:, :KINDS] / x[:, KINDS:]).float() for layer, x in sums.items()}
        return replace(self, kept=Fitted(shares))


class _Kept(Method):
    """What each mask would keep of the weight of documents' tokens, and the number of these, `[h kinds + 1]`."""

    role: str
    sinks: int

    def idle(self, call: Call) -> bool:
        return call.cross

    @reads(Site.PATTERN)
    def share(self, weights: Tensor, call: Call) -> Sum:
        masks = _masks(call, self.role, self.sinks)
        kept = [(weights * rule.keeps(call.pairs)).sum(-1).double() for rule in masks]
        found = torch.stack([*kept, torch.ones_like(kept[0])], -1)  # [b h r kinds + 1]
        asks = call.marked_queries(self.role) & call.is_text
        return Sum.of((found * asks[..., None]).sum((0, 2)))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: statistic.value for layer, statistic in readings.items()}


def _masks(call: Call, role: str, sinks: int) -> tuple[Rule, ...]:
    """What a document's tokens see: all documents' first tokens, their own document, or both."""
    regions = call.regions(role)
    first = tuple(Region(tuple((start, min(start + sinks, stop)) for start, stop in spans)) for spans in regions)

    def at_start(query: Tensor, key: Tensor) -> Tensor:
        mine, theirs = (by_text(span_of, regions, place) for place in (query, key))
        return (mine < 0) | (theirs < 0) | by_text(marked, first, key)

    def together(query: Tensor, key: Tensor) -> Tensor:
        mine, theirs = (by_text(span_of, regions, place) for place in (query, key))
        return (mine < 0) | (theirs < 0) | (mine == theirs)

    return Where(at_start), Where(together), Where(at_start) | Where(together)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    parts = ["Read.\n", "The number of Oslo is 52.\n", "The number of Lima is 17.\n", "The number of Lima is"]
    ids = [tokenizer(part, return_tensors="pt").input_ids for part in parts]
    ends = torch.tensor([0, *(x.shape[1] for x in ids)]).cumsum(0).tolist()
    text, roles = torch.cat(ids, 1), {"documents": ((ends[1], ends[2]), (ends[2], ends[3]))}
    method = fit(BlindSight(), model, [{"input_ids": text, "roles": roles}])
    with attach(model, method, roles=roles) as run:
        print(tokenizer.decode(run.generate(text, max_new_tokens=4, do_sample=False)[0]))
        print(run.activity())
