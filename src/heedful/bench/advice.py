"""Which setting to use: the front of what is known to hold, in words."""

from __future__ import annotations

from collections.abc import Iterable

from heedful.bench.results import PLAIN, Results
from heedful.core.figures import frontier, percent

SAVED = 0.95  # of the unedited model's cost: what costs more saves nothing worth a sentence
WORDS = {"cache": "cache", "pairs": "pairs", "prefill": "prefill time"}  # costs that advice is given on
FRACTIONS = {"three quarters": 3 / 4, "two thirds": 2 / 3, "half": 1 / 2, "a third": 1 / 3, "a quarter": 1 / 4}
NEAR = 0.02  # a share so near to a fraction is called by it


def holding(c: Results) -> list[str]:
    """The methods that are decided and hold: safe, or better."""
    return [name for name in c.contenders if name != PLAIN and c.verdict(name) in ("helps", "safe")]


def front(c: Results, cost: str) -> list[str]:
    """What holds and saves of a cost, and is beaten by nothing that holds in cost and worth at once; cheapest first."""
    known = {name: x for name, x in cheap(c, cost).items() if name in holding(c)}
    return frontier({name: (x, c.worth[name].mean) for name, x in known.items()})


def cheap(c: Results, cost: str) -> dict[str, float]:
    """Every method that saves of a cost, in every turn, and what share of it is left."""
    asked = (p for p in c.prices if p.contender in c.worth and p.contender not in c.inactive)
    found = {p.contender: ratio for p in asked if (ratio := p.ratios.get(cost))}
    return {name: ratio.median for name, ratio in found.items() if ratio.high < SAVED}


def advice(c: Results) -> Iterable[str]:
    """A sentence for each cost: what to use at which share of it, and below which share nothing holds."""
    for cost, word in WORDS.items():
        costs = cheap(c, cost)
        if not costs:
            continue
        best = front(c, cost)
        told = [f"at {share(costs[name])} of the {word} use {name}" for name in reversed(best)]
        least = min((costs[name] for name in best), default=None)
        below = [name for name, x in costs.items() if least is None or x < least - NEAR]
        open_ = [name for name in below if c.verdict(name) not in ("harms", "helps", "safe")]
        where = f"nothing that saves {word}" if least is None else f"below {share(least)} nothing"
        if below:
            told.append(
                f"{where} is known to hold yet: undecided are {', '.join(open_)}" if open_ else f"{where} holds"
            )
        sentence = "; ".join(told)
        yield sentence[0].upper() + sentence[1:] + "."


def share(x: float) -> str:
    """A share as people say it."""
    name = min(FRACTIONS, key=lambda name: abs(FRACTIONS[name] - x))
    return name if abs(FRACTIONS[name] - x) <= NEAR else percent(x)
