"""Deconstructing attention: does attention in every other layer save most of what attention is worth?"""

from __future__ import annotations

from claims._lab import SHORT, numbers
from claims.ledger import Claim, run
from heedful.methods import NoMixing

WAYS = {"attention": None, "in the second layer": NoMixing().on(layers=0), "no mixing": NoMixing()}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = numbers(WAYS, seed, "loss")
    whole, half, none = (found[f"loss, {name}"] for name in WAYS)
    return (none - whole) - 2 * (half - whole), found


CLAIM = Claim(
    key="P285",
    method="NoMixing",
    says="Without token mixing a model collapses; with attention in every other layer it does nearly as well as whole.",
    paper_number="WikiText perplexity 38.1 with attention, 45.8 with it in every other layer, 993.5 without (500M)",
    setup=f"The lab's text course, {SHORT.steps} steps, with attention in both layers, in the second, and in none, "
    "gated feed-forward parts of as many parameters standing in. Loss on another held-out tenth a seed.",
    effect="nats a byte that losing attention in both layers costs more than twice losing it in one",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
