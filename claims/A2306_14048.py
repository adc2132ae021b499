"""HeavyHitter: does a fifth of the cache go further when half of it holds heavy hitters instead of more new entries?"""

from __future__ import annotations

from claims._cache import Newest, losses, prose
from claims.ledger import Claim, run
from heedful.methods.sparse.cache.heavy_hitter import HeavyHitter

TOKENS, REST, BUDGET = 384, 128, 0.2


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text = prose(seed, TOKENS, REST)
    numbers = {}
    for name, method in (
        ("everything", None),
        ("heavy hitters and newest", HeavyHitter(BUDGET)),
        ("newest alone", Newest(BUDGET, sinks=0)),
        ("sinks and newest", Newest(BUDGET)),
    ):
        numbers[f"loss, {name}"] = losses(text, method)
    return numbers["loss, newest alone"] - numbers["loss, heavy hitters and newest"], numbers


CLAIM = Claim(
    key="2306.14048",
    method="HeavyHitter",
    says="A fifth of the cache is enough if half of it are heavy hitters; the newest entries alone are not.",
    paper_number="the full cache's accuracy at 20% of it, where newest entries alone fall far behind",
    setup=f"SmolLM2-135M, {TOKENS} tokens of prose, the cache cut to {BUDGET:.0%}, and the loss of the next {REST} "
    "tokens, against the newest entries alone. Beside them four first and the newest entries, the harder baseline.",
    effect="nats of loss per token that heavy hitters save at equal memory",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
