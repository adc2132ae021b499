"""SeerAttention: does a gate that learned from the map choose better blocks than block means, or sinks and a window?"""

from __future__ import annotations

import statistics

from torch import Tensor

from claims._sparse import calls, chosen, error, heads, language_model, loss, share, sinks_and_window
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import fit
from heedful.kit.blocks import Grid, means
from heedful.methods.sparse.prefill.seer_attention import SeerAttention

TOKENS, WORDS, LEARNED = 512, 450, 4  # of a text, and so many texts to learn from
METHOD = SeerAttention(share=0.3, last=0, block=16, most=1.0, steps=150)


def tokens(words: str) -> dict[str, Tensor]:
    return {"input_ids": language_model().tokenizer(words, return_tensors="pt").input_ids[:, :TOKENS]}


def by_means(grid: Grid, table: Tensor) -> Tensor:
    """As many blocks in every row, its own among them, by the product of block means: a gate that learned nothing."""
    weight = grid.pooled(means(grid.query, grid.rows), means(grid.key, grid.cols)) + 2.0 * grid.band(1)
    place = weight.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (place < table.sum(-1, keepdim=True)) & grid.open


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model = language_model().model
    method = fit(METHOD, model, [tokens(words) for words in apart(seed, LEARNED, WORDS, fitting=True)])
    inputs = tokens(*apart(seed, 1, WORDS))
    found, dense_loss = calls(inputs)
    rows: list[dict[str, float]] = []
    for call in found:
        grid, table = chosen(method, call)
        dense = heads(grid, None)
        others = {
            "error": table,
            "block_means": by_means(grid, table),
            "sinks_and_window": sinks_and_window(grid, table),
        }
        rows.append({name: error(heads(grid, each), dense) for name, each in others.items()})
        rows[-1] |= {f"density, {name}": share(grid, each) for name, each in others.items()}
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    numbers |= {"loss_dense": dense_loss, "loss": loss(inputs, method)}
    return min(numbers["block_means"], numbers["sinks_and_window"]) - numbers["error"], numbers


CLAIM = Claim(
    key="P167",
    method="SeerAttention",
    says="A small gate that learned from a model's own maps which blocks matter finds them better than rules that "
    "nobody taught.",
    paper_number="90 % of the pairs left out at 32k tokens with little loss of perplexity, 5.67 x FlashAttention-2",
    setup=f"SmolLM2-135M, a text of {TOKENS} tokens a seed, gates taught on {LEARNED} texts of other topics, "
    f"{METHOD.steps} steps; every layer's own queries and keys, blocks of {METHOD.block}, {METHOD.share:.0%} of the "
    "pairs of blocks: relative L1 error of the heads, against as many blocks a row by the product of block means, and "
    "against the first block and a window with at least as many",
    effect="error of the better of block means, and sinks and window, minus error",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
