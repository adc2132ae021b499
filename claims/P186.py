"""FlexPrefill: is a pattern chosen for each head from its last queries better than a fixed one of the same size?"""

from __future__ import annotations

import statistics

from claims._sparse import at_random, calls, chosen, error, heads, loss, share, sinks_and_window, text
from claims.ledger import Claim, run
from heedful.methods.sparse.prefill.flex_prefill import FlexPrefill

TOKENS = 1024
METHOD = FlexPrefill(0.9, 0.1, 128, size=32, most=1.0)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    inputs = text(seed, TOKENS)
    found, dense_loss = calls(inputs)
    rows: list[dict[str, float]] = []
    for call in found:
        grid, table = chosen(METHOD, call)
        dense = heads(grid, None)
        rows.append(
            {
                "density": share(grid, table),
                "error": error(heads(grid, table), dense),
                "sinks_and_window": error(heads(grid, sinks_and_window(grid, table)), dense),
                "random_blocks": error(heads(grid, at_random(grid, table, seed)), dense),
            }
        )
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    numbers["loss_dense"], numbers["loss"] = dense_loss, loss(inputs, METHOD)
    return numbers["sinks_and_window"] - numbers["error"], numbers


CLAIM = Claim(
    key="P186",
    method="FlexPrefill",
    says="Patterns chosen for each head and input are more accurate than fixed ones; gamma trades speed for accuracy",
    paper_number="none given in the abstract",
    setup=f"SmolLM2-135M, texts of {TOKENS} tokens, every layer's own queries and keys, blocks of 32, gamma 0.9, at "
    "least 128 tokens: relative L1 error of the heads, against the first block and a window, at least as many blocks a "
    "head",
    effect="error of sinks and window minus error",
    measure=measure,
    seeds=3,
)

if __name__ == "__main__":
    run(CLAIM)
