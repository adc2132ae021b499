"""Calibrated sinks: columns whose mean received attention passes a threshold, but for the first, keep a share beta."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Readings
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt, Share
from heedful.core.reweight import Reweight, reweights
from heedful.core.stats import Sum
from heedful.core.summary import Summary, sums
from heedful.kit.batches import Batch, at_least_one
from heedful.kit.head_search import Head, gains, heads_here


class ACT(Method):
    """Takes attention from sinks inside the text; what each row frees goes to its other keys, in proportion.

    Acts in every head until `fit` has chosen some: those that gain, one by one, on calibration batches with "options"
    `[b c]` (first tokens of answers, the right one first) or "target" `[b]`, or else on the text's own tokens.
    """

    paper = Paper(
        "P003",
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        "Zhongzhi Yu, Zheng Wang, Yonggan Fu, Huihong Shi, Khalid Shaikh, Yingyan Celine Lin",
        2024,
        "2406.15765",
        "ICML 2024",
        differs=(
            "The authors try every head of layers 2 to 30 of 32 and keep those that raise accuracy; here a fit tries "
            "the heads that have most to calibrate, `tries` of them, in all layers but the first two and the last, and "
            "keeps those that raise the log-probability of the right answer. Without a fit every head is calibrated.",
            "A column's mean runs over the rows that may see it: where attention is causal that is the authors' "
            "divisor T - k, and it has a meaning in windows and encoders too.",
            "A row whose weight lies on sinks alone stays as it is, having no key to give to.",
            "Decoding steps are left as they are, having no map of their own to calibrate by.",
        ),
    )
    one_text = True
    causal = False  # a column's mean, and so what every row gives away, depends on later rows
    chunk_invariant = False  # only the call that reads the prompt is calibrated, by its own rows
    beta: Share = 0.4  # share of a sink's weight that it keeps, 0 to 1; the authors' code: 0.4
    threshold: Share = 0.1  # mean weight that a sink receives from a row; the authors' code: 0.1
    ratio: PositiveFloat | None = None  # if given, the threshold is ratio / number of tokens; the paper's text: 5
    # heads that a fit tries, those with the most inner sinks; the authors: None, every one
    tries: PositiveInt | None = 8
    heads: tuple[Head, ...] | None = None  # (layer, head) pairs that a fit chose; None: every head

    @classmethod
    def neutral(cls) -> ACT:
        return cls(beta=1.0)

    @classmethod
    def example(cls) -> ACT:
        return cls(threshold=0.02)

    def idle(self, call: Call) -> bool:
        if self.beta == 1 or call.phase is Phase.DECODE:
            return True
        return self.heads is not None and not heads_here(self, self.heads, call)

    @reweights("received")
    def calibrate(self, summary: Summary, call: Call) -> Reweight:
        sinks = self.sinks(summary, call)
        if self.heads is not None:
            chosen = torch.zeros(call.heads, 1, dtype=torch.bool, device=sinks.device)
            chosen[heads_here(self, self.heads, call)] = True
            sinks = sinks & chosen
        return Reweight(torch.where(sinks, self.beta, 1.0), ~sinks)

    def sinks(self, summary: Summary, call: Call) -> Tensor:
        """Which columns lose weight, `[b h k]`."""
        high = self.threshold if self.ratio is None else self.ratio / call.is_text.sum(-1, keepdim=True).clamp(min=1)
        found = summary.mean > high
        return found & (found.cumsum(-1) > 1)

    def fit(self, context: FitContext, batches: Iterable[Batch]) -> ACT:
        """Try heads one by one and keep those with which the batches are answered better."""
        found = list(at_least_one(self, batches, {"input_ids": "...", "target": "token ids"}))
        reader, depth = _Sinks(replace(self, heads=None)), len(context.layers)
        with torch.no_grad(), context.attach(reader) as run:
            for batch in found:
                run(**{k: v for k, v in batch.items() if k not in ("options", "target", "roles")})
            counted: dict[Head, float] = run[reader]
        positions = [place for place, number in counted.items() if 2 <= place[0] < depth - 1 and number > 0]
        tried = sorted(positions, key=lambda place: (-counted[place], place))[: self.tries]
        gained = gains(context, replace(self, heads=None), tried, found)
        return replace(self, heads=tuple(sorted(place for place, gain in gained.items() if gain > 0)))


class _Sinks(Method):
    """How many columns of each head would be calibrated, by (layer, head)."""

    method: ACT

    @sums("received")
    def count(self, summary: Summary, call: Call) -> Sum:
        return Sum.of(self.method.sinks(summary, call).sum((0, -1)).double())

    def answer(self, readings: Readings) -> dict[Head, float]:
        return {(n, h): float(x) for n, stat in readings.items() for h, x in enumerate(stat.value)}


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    capitals = {"Italy": "Rome", "Japan": "Tokyo", "France": "Paris", "Egypt": "Cairo"}
    asked = [tokenizer(f"Q: What is the capital of {c}?\nA:", return_tensors="pt") for c in capitals]
    cities = [torch.tensor(tokenizer(f" {city}").input_ids[:1]) for city in capitals.values()]
    method = fit(ACT(), model, [{**text, "target": city} for text, city in zip(asked, cities, strict=True)])
    print(method)
    with attach(model, method) as run:
        print(tokenizer.decode(run.generate(**asked[0], max_new_tokens=8, do_sample=False)[0]))
        print(run.activity())
