"""Q-Filters: does a cache cut along the queries' main direction cost less than one cut to sinks and newest entries?"""

from __future__ import annotations

from functools import cache

from claims._cache import Newest, default, losses, prose, recall
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods.sparse.cache.q_filters import QFilters

TOKENS, REST, BUDGET, WINDOW = 384, 128, 64, 32


@cache
def fitted() -> QFilters:
    texts = [{"input_ids": prose(1000 + i, TOKENS, 1).context} for i in range(4)]
    found: QFilters = fit(QFilters(BUDGET, WINDOW), default().model, texts)
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {}
    for name, text in (("prose", prose(seed, TOKENS, REST)), ("numbers", recall(seed))):
        for how, method in (
            ("everything", None),
            ("Q-Filters", fitted()),
            ("random directions", QFilters(BUDGET, WINDOW, seed=seed)),
            ("sinks and newest", Newest(BUDGET)),
        ):
            numbers[f"loss on {name}, {how}"] = losses(text, method)
    return numbers["loss on prose, sinks and newest"] - numbers["loss on prose, Q-Filters"], numbers


CLAIM = Claim(
    key="P134",
    method="QFilters",
    says="A cache cut to the keys along the queries' main direction loses less than one cut to sinks and a window.",
    paper_number="up to 65% smaller perplexity drop than Streaming-LLM (abstract)",
    setup=f"SmolLM2-135M, {TOKENS} tokens of prose whose cache is cut to {BUDGET} entries a head, {WINDOW} of them the "
    f"newest, and the loss of the next {REST} tokens, against 4 first and {BUDGET - 4} newest entries. Filters from 4 "
    "other texts. Beside it random directions, and towns' numbers asked for after the cut.",
    effect="nats of loss per token that the filters save at equal memory",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
