"""Loki: do the principal axes of keys rank them better than random axes, as many of them?"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from claims._cache import default, losses, prose
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods.sparse.decode.loki import Loki

TOKENS, REST = 256, 128


@cache
def fitted() -> Loki:
    found: Loki = fit(Loki(), default().model, [{"input_ids": prose(1000 + i, 384, 1).context} for i in range(4)])
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    text, numbers = prose(seed, TOKENS, REST), {}
    for how, method in (
        ("everything", None),
        ("principal axes", fitted()),
        ("random axes", replace(fitted(), axes=None, seed=seed)),
        ("all axes", replace(fitted(), rank=1.0)),
    ):
        numbers[f"loss, {how}"] = losses(text, method)
    return numbers["loss, random axes"] - numbers["loss, principal axes"], numbers


CLAIM = Claim(
    key="P170",
    method="Loki",
    says="Keys lie in few dimensions: their principal axes rank keys better than as many others.",
    paper_number="none given (abstract)",
    setup=f"SmolLM2-135M, the last {REST} of {TOKENS + REST} tokens of prose, each query seeing a quarter of its keys, "
    "ranked in 16 of 64 dimensions: the principal axes of 4 other texts' keys against random ones. Beside them the "
    "exact ranking in all dimensions.",
    effect="nats of loss per token that the axes save",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
