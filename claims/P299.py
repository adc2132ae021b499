"""Steer2Edit: at the same shift of the trait, does editing heads cost less than adding the vector everywhere?"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from claims._texts import passages
from claims.ledger import Claim, run
from heedful import Call, Fitted, Method, Site, at, attach, fit, models, operate
from heedful.methods.intervene.steer2edit import PAPER, Steer2Edit

GOOD = ("wonderful", "excellent", "delightful", "lovely", "great", "fantastic")
BAD = ("terrible", "awful", "dreadful", "horrible", "bad", "disgusting")
THINGS = (
    "film", "meal", "hotel", "concert", "book", "trip", "party", "lesson", "speech", "garden", "coffee", "game",
    "house", "museum", "song", "walk",
)  # fmt: skip
SHIFT = 1.0  # nats of log odds that both ways must move the trait by
ALPHAS = (0.05, 0.4, 0.8)  # among the authors' best settings, which they search for each model
HALVINGS = 7


class AddVector(Method):
    """Activation steering: the steering vector on top of every attention block's output."""

    paper = PAPER
    vectors: Fitted
    by: float = 1.0

    @at(Site.OUTPUT)
    def add(self, output: Tensor, call: Call) -> Tensor:
        return output + self.by * self.vectors[f"v.{call.layer}"].to(output)


@cache
def model() -> models.Loaded:
    return models.default()


def ids(texts: list[str]) -> Tensor:
    """Texts of one length each, one batch."""
    tokenizer: Any = model().tokenizer
    found = [tokenizer(text).input_ids for text in texts]
    n = min(map(len, found))
    return torch.tensor([x[:n] for x in found])


def batches(things: list[str]) -> list[dict[str, Any]]:
    tokenizer: Any = model().tokenizer
    return [
        {
            **tokenizer(f"I must say that the {thing} was {word}, truly {word}.", return_tensors="pt"),
            "positive": words is GOOD,
        }
        for thing in things
        for words in (GOOD, BAD)
        for word in words[:3]
    ]


def trait(of: Callable[..., Any], things: list[str]) -> float:
    """Log odds of a good word over a bad one as the next, mean over things that the fit did not see."""
    tokenizer: Any = model().tokenizer
    odds = []
    for thing in things:
        shown = tokenizer(f"To be honest, the {thing} was", return_tensors="pt")
        chances = of(**shown, use_cache=False).logits[0, -1].log_softmax(-1)
        good, bad = (chances[[tokenizer(f" {w}").input_ids[0] for w in words]].logsumexp(0) for words in (GOOD, BAD))
        odds.append(float(good - bad))
    return statistics.fmean(odds)


def matched(shift: Callable[[float], float], low: float, high: float) -> float:
    """The strength at which the trait has moved by SHIFT, by halving its logarithm; stronger must mean more."""
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if shift(middle) < SHIFT else (low, middle)
    return (low * high) ** 0.5


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    plain: Any = model().model
    things = random.Random(seed).sample(THINGS, len(THINGS))
    seen, unseen = things[:8], things[8:]
    texts = ids(passages(seed, 6, 120))[:, :96]
    fitted = fit(Steer2Edit(), plain, batches(seen))
    start = trait(plain, unseen)

    def edited(reach: float, alpha: float) -> Any:  # as reach grows rho falls, and heads take in more of the vector
        return operate(plain, Steer2Edit(1 / reach, alpha, fitted.vectors))

    def steered(by: float, what: Callable[[Any], float]) -> float:
        with attach(plain, AddVector(fitted.vectors, by)) as attached:
            return what(attached)

    def loss(of: Any, neutral: Tensor = texts[2:]) -> float:
        return float(of(input_ids=neutral, labels=neutral, use_cache=False).loss)

    by = matched(lambda x: steered(x, lambda m: trait(m, unseen)) - start, 0.02, 2.0)
    tried = {}
    for alpha in ALPHAS:
        reach = matched(lambda x, alpha=alpha: trait(edited(x, alpha), unseen) - start, 0.5, 64.0)
        tried[loss(edited(reach, alpha), texts[:2])] = (reach, alpha)
    reach, alpha = tried[min(tried)]  # chosen on two texts, measured on four others
    new = edited(reach, alpha)
    numbers = {
        "alpha": alpha,
        "rho": 1 / reach,
        "steering by": by,
        "shift, edited": trait(new, unseen) - start,
        "shift, steered": steered(by, lambda m: trait(m, unseen)) - start,
        "neutral loss, plain": loss(plain),
        "neutral loss, edited": loss(new),
        "neutral loss, steered": steered(by, loss),
    }
    return numbers["neutral loss, steered"] - numbers["neutral loss, edited"], numbers


CLAIM = Claim(
    key="P299",
    method="Steer2Edit",
    says="Editing the heads that carry a steering vector moves the trait at less cost than adding the vector.",
    paper_number="at matched performance: safety up to +17.2 %, truthfulness +9.8 %, reasoning length -12.2 %",
    setup="SmolLM2-135M-Instruct, praise against blame of 8 things; alpha of three, by loss on other texts, rho of the "
    "edit and strength of additive steering (the same vectors at every attention block) set by halving so that each "
    f"moves praise of 8 other things by {SHIFT} nat; loss on neutral text."
    " (Redesigned twice after first results were seen; every version pointed the same way.)",
    effect="nats a token that additive steering loses more on neutral text",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
