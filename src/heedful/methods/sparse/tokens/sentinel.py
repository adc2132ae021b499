"""Sentences by w . x + c: x what a prompt's last query gives each of their tokens in every head, of what all get."""

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
from heedful.core.kinds.tokens import Prompt, Reader, Tokens
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import RoleName
from heedful.core.regions import Span
from heedful.core.sites import Site, reads
from heedful.core.stats import Sum
from heedful.kit.budget import Budget, room_for
from heedful.kit.regression import log_odds, logistic
from heedful.methods.sparse.tokens._spans import with_room, without

_PAPER = Paper(
    "P148",
    "Sentinel: Attention Probing of Proxy Models for LLM Context Compression with an Understanding Perspective",
    "Yong Zhang, Yanwen Huang, Ning Cheng, Yang Guo, Yun Zhu, Yanmeng Wang, Shaojun Wang, Jing Xiao",
    2025,
    "2505.23277",
    "arXiv",
    differs=(
        "The context is all from the first sentence to the last, and the spans of a role say where sentences stand.",
        "The authors' code reads a classifier and does not train it: here features are standardised, and the penalty "
        "is half the squared length of the weights beside the summed loss, as scikit-learn has it unasked.",
        "A share of the tokens is rounded up.",
        "A context is read whole; the authors cut one that is too long for the proxy.",
    ),
)


class _EachHead(Method):
    """What the last query of a prompt gives to each token in each head, `[layers*h n]`."""

    total: int  # tokens of the prompt

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum | None:
        mine = (call.q_pos[0, 0] == self.total - 1).nonzero().flatten()
        return Sum.of(call.by_key(weights[0, :, mine[0]], self.total)) if len(mine) else None

    def answer(self, readings: Readings) -> Tensor:
        return torch.cat(readings.values_by_layer)


class Sentinel(Tokens):
    """Keeps the sentences that a linear probe of a small model's attention finds relevant to the question.

    `fit` takes batches of one text each: "input_ids" `[1 n]`, "roles" with the spans of the sentences, and "label", 1
    for each that is relevant and 0 for the others.
    """

    paper = _PAPER
    budget: Budget = 0.5  # tokens of the sentences that stay, or a share; the authors' code: 0.5
    role: RoleName = "documents"  # the role whose spans are sentences, which stay or go whole
    probe: Fitted | None = None  # weight, mean and deviation [layers*h], and bias [1], from a fit
    seed: int | None = None  # without a fit: a random probe

    @classmethod
    def neutral(cls) -> Sentinel:
        return cls(budget=1.0, seed=0)

    @classmethod
    def example(cls) -> Sentinel:
        return cls(seed=0)

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        spans = prompt.spans(self.role)
        if not spans:
            return prompt
        scores = self.scores(features(read(prompt, _EachHead(len(prompt))), spans))
        room = room_for(self.budget, sum(b - a for a, b in spans))
        kept = with_room(spans, scores, room)
        return without(prompt, [span for span in spans if span not in kept])

    def scores(self, x: Tensor) -> Tensor:
        """How relevant the probe finds sentences of these features `[s f]`."""
        return log_odds(self, "probe", x)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> Sentinel:
        """Logistic regression of the labels on the features of all texts' sentences."""
        rows, labels = [], []
        for batch in batches:
            ids, roles = batch["input_ids"], batch["roles"]
            part = _EachHead(ids.shape[1])
            with torch.no_grad(), context.attach(part) as run:
                run.roles = roles
                run(input_ids=ids)
                rows.append(features(run[part], roles[self.role]))
            labels.append(torch.as_tensor(batch["label"]).to(rows[-1]))
            if labels[-1].shape != rows[-1].shape[:1]:
                rule = f"must have a label for each of {len(rows[-1])} sentences"
                raise FieldError(self, "batches", tuple(labels[-1].shape), rule, [{"label": [0, 1]}])
        if not rows or len(torch.cat(labels).unique()) < 2:
            raise FieldError(self, "batches", len(rows), "must hold sentences of both labels", [{"label": [0, 1]}])
        return replace(self, probe=Fitted(logistic(torch.cat(rows), torch.cat(labels))))


def features(given: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """`[f n]` to `[s f]`: the mean over each sentence's tokens of their shares of what the whole context gets."""
    context = given[:, spans[0][0] : spans[-1][1]].sum(1).clamp(min=1e-8)
    return torch.stack([given[:, a:b].mean(1) / context for a, b in spans])


if __name__ == "__main__":
    from heedful import arrange, fit, models

    model, tokenizer, _ = models.default()
    things = {"lamp": "green", "word": "walnut", "train": "late", "dog": "asleep"}

    def asked(name: str) -> Prompt:
        tokens: list[int] = []
        spans = []
        for each, thing in things.items():
            piece = tokenizer(f"The {each} is {thing}.\n").input_ids
            spans.append((len(tokens), len(tokens) + len(piece)))
            tokens += piece
        tokens += tokenizer(f"Question: how is the {name}?\nAnswer:").input_ids
        return Prompt(tuple(tokens), {"documents": tuple(spans)})

    batches = [
        {
            "input_ids": torch.tensor([asked(name).tokens]),
            "roles": asked(name).roles,
            "label": [n == name for n in things],
        }
        for name in ("lamp", "word", "train")
    ]
    print(tokenizer.decode(arrange(model, asked("dog"), fit(Sentinel(0.3), model, batches)).tokens))
