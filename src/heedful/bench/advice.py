"""Which setting to use: the front of what is known to hold, in words."""

from __future__ import annotations

from collections.abc import Iterable

from heedful.bench.results import PLAIN, Results
from heedful.core.figures import frontier, percent

SAVED = 0.95  # of the unedited model's cost: what costs more saves nothing worth a sentence
AXES = {
    "cache_ratio": ("of the cache", "cache"),
    "density": ("of the pairs", "pairs"),
    "prefill_ratio": ("of the prefill time", "prefill time"),
}
FRACTIONS = {"three quarters": 3 / 4, "two thirds": 2 / 3, "half": 1 / 2, "a third": 1 / 3, "a quarter": 1 / 4}
NEAR = 0.02  # a share so near to a fraction is called by it


def holding(c: Results) -> list[str]:
    """The methods that are decided and hold: safe, or better."""
    return [name for name in c.contenders if name != PLAIN and c.verdict(name) in ("helps", "safe")]


def front(c: Results, field: str) -> list[str]:
    """What holds and saves of a cost, and is beaten by nothing that holds in cost and worth at once; cheapest first."""
    cost = {name: x for name, x in cheap(c, field).items() if name in holding(c)}
    return frontier({name: (x, c.worth[name].mean) for name, x in cost.items()})


def cheap(c: Results, field: str) -> dict[str, float]:
    """Every method that saves of a cost, and what share of it is left."""
    most = {"prefill_ratio": "prefill_high"}.get(field, field)  # times vary: what saves some is shorter in every turn
    found = {p.contender: (getattr(p, field), getattr(p, most)) for p in c.prices if p.contender in c.worth}
    return {name: x for name, (x, y) in found.items() if x is not None and y < SAVED and name not in c.inactive}


def advice(c: Results) -> Iterable[str]:
    """A sentence for each cost: what to use at which share of it, and below which share nothing holds."""
    for field, (whole, word) in AXES.items():
        costs = cheap(c, field)
        if not costs:
            continue
        best = front(c, field)
        told = [f"at {share(costs[name])} {whole} use {name}" for name in reversed(best)]
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
