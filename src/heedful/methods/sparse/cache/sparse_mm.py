"""w + m + (b - m) s / mean(s) entries for a head: s = how often it looks most at what it names, over size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import OddInt, PositiveInt, Share
from heedful.core.sites import Site, at, reads
from heedful.core.stats import Cat, Statistic
from heedful.kit.batches import at_least_one
from heedful.kit.budget import Budget, keep_best
from heedful.kit.seeds import seed_of
from heedful.methods.sparse.cache._fits import other_model
from heedful.methods.sparse.cache._voted import VOTES, UnevenCache

GOOD_BATCHES = [{"input_ids": "...", "pixel_values": "...", "things": "[b n], True where what comes next is shown"}]


class SparseMM(UnevenCache):
    """Heads that look at things in an image while they are named keep more of the cache; votes say which entries.

    Fit it first: `fit` takes batches of the model's inputs with "things": which tokens of each prompt show what the
    prompt's last token is about to name.
    """

    paper = Paper(
        "P204",
        "SparseMM: Head Sparsity Emerges from Visual Concept Responses in MLLMs",
        "Jiahui Wang, Zuyan Liu, Yongming Rao, Jiwen Lu",
        2025,
        "2506.05344",
        "ICCV 2025",
        differs=(
            *VOTES,
            "The authors score heads on pages of letters, and on photographs with names and boxes, while the model "
            "writes; here each prompt gives one token to name, and where what it names stands.",
        ),
    )
    budget: Budget = 1024  # entries of the average head, the window included, or a share; the paper: 64 to 2048
    window: PositiveInt = 32  # last queries that vote, and entries that stay in every head; the authors' code: 32
    kernel: OddInt = 7  # tokens that votes are pooled over, odd; the authors' code: 7
    floor: Share = 0.1  # share of the budget before the window that every head keeps; the authors' scripts: 0.1
    scores: Fitted | None = None  # "scores.LAYER" [g], from a fit
    seed: int | None = None  # without a fit: random scores, the control

    @classmethod
    def neutral(cls) -> SparseMM:
        return cls(budget=1.0, floor=1.0, seed=0)

    @classmethod
    def example(cls) -> SparseMM:
        return cls(budget=6, window=2, kernel=3, seed=0)

    @at(Site.CACHE)
    def allot(self, entries: CachedKV, call: Call) -> Tensor:
        last, most = self.last(entries, call), self.most(call)
        votes = self.pooled(entries, call, last)
        window = most.clamp(max=self.window)
        even = most - window
        least = (self.floor * even.double()).floor()  # float32 rounds shares otherwise
        room = window + least + (self.shares(call).to(even.device) * (even - least)).round()
        return keep_best(votes.masked_fill(last, float("inf")), entries, room)

    def shares(self, call: Call) -> Tensor:
        """What the layer's heads get of what is not shared evenly, 1 on the average of all layers, `[1 g 1]`."""
        if self.scores is None:
            found = _drawn(seed_of(self, "scores"), call.listed, call.kv_heads)
        else:
            found = _relative(self.scores)
        if found.keys() != {*call.listed} or len(found[call.layer]) != call.kv_heads:
            raise other_model(self, "scores", call, f"and {call.kv_heads} key heads in layer {call.layer}")
        return found[call.layer][None, :, None]

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SparseMM:
        """Score heads: how often the token that the last one looks at most is of the thing, over the thing's size."""
        total: dict[int, Tensor] = {}
        for batch in at_least_one(self, batches, GOOD_BATCHES[0]):
            inputs = {name: x for name, x in batch.items() if name != "things"}
            things = batch.get("things")
            if things is None or not bool(things.any(-1).all()):
                raise FieldError(self, "batches", sorted(batch), 'must hold "things" that are somewhere', GOOD_BATCHES)
            filled = inputs.get("attention_mask")
            if filled is not None and not bool(filled[:, -1].all()):
                rule = "must be padded on the left, so that each prompt's last token names the thing"
                raise FieldError(self, "batches", sorted(batch), rule, GOOD_BATCHES)
            with context.attach(_Peaks()) as run, torch.no_grad():
                run(**inputs, use_cache=False)
                peaks: dict[int, Tensor] = run[_Peaks()]
            worth = things / things.sum(-1, keepdim=True)  # [b n]
            sizes = {layer.number: layer.kv_heads for layer in context.layers}
            for layer, peak in peaks.items():
                hits = worth.to(peak.device).double().gather(1, peak).sum(0)  # [h]
                total[layer] = total.get(layer, 0) + hits.unflatten(0, (sizes[layer], -1)).sum(-1)
        return replace(self, scores=Fitted({f"scores.{layer}": x.float() for layer, x in total.items()}))


class _Peaks(Method):
    """Which token each head of a text's last query looks at most, in layers that see nothing ahead."""

    @reads(Site.PATTERN)
    def peak(self, weights: Tensor, call: Call) -> Statistic | None:
        if call.cross or not call.causal:
            return None
        return Cat.of(f"{call.rows.start:09d}", weights.detach()[:, :, -1].argmax(-1))

    def answer(self, readings: Readings) -> dict[int, Tensor]:
        return {layer: stat.value[-1] for layer, stat in readings.items()}


def _against_mean(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    """Over their mean; all alike where there is nothing to tell them by."""
    every = torch.cat(list(scores.values()))
    mean = every.sum() / len(every)
    return {layer: x / mean if mean > 0 else torch.ones_like(x) for layer, x in scores.items()}


@cache
def _relative(scores: Fitted) -> dict[int, Tensor]:
    return _against_mean({int(name.split(".")[1]): x.double() for name, x in scores.items()})


@cache
def _drawn(seed: int, layers: range, heads: int) -> dict[int, Tensor]:
    by = torch.Generator().manual_seed(seed)
    return _against_mean({layer: torch.rand(heads, generator=by, dtype=torch.double) for layer in layers})


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    story = tokenizer("The code is Berlin. " + "The sea is calm. " * 40 + "The code is", return_tensors="pt")
    things = torch.zeros_like(story.input_ids, dtype=torch.bool)
    things[:, 3] = True
    method = fit(SparseMM(budget=64, window=16), model, [{**story, "things": things}])
    with attach(model, method) as run:
        print(tokenizer.decode(run.generate(**story, max_new_tokens=10, do_sample=False)[0, -10:]))
        print(run.activity())
