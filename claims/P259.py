"""HyperAttention: do sorted blocks and sampled columns together come nearer than either alone at the same cost?"""

from __future__ import annotations

import statistics
from dataclasses import replace

import torch
from torch import Tensor

from claims._sparse import calls, error, text
from claims.ledger import Claim, run
from heedful.core.call import Call
from heedful.methods.sparse.prefill.hyper_attention import HyperAttention, _Square

TOKENS, LEAST, COST = 1024, 128, 64  # so many keys a query in each square


class SampleAlone(HyperAttention):
    """The control: no blocks."""

    def sorted(self, *given: object) -> _Square:
        found = super().sorted(*given)  # type: ignore[arg-type]
        return replace(found, query=torch.full_like(found.query, -1))


WAYS = {
    "both": HyperAttention(LEAST, COST // 2, COST // 2),
    "blocks alone": HyperAttention(LEAST, COST, 0),
    "sample alone": SampleAlone(LEAST, COST, COST),
}


def heads(call: Call, method: HyperAttention | None) -> Tensor:
    place = torch.arange(TOKENS)
    bias = torch.where(place[:, None] >= place, 0.0, -torch.inf)
    if method is not None:
        bias = bias + method.bias(list(method.squares(call)), (1, call.heads), place, place)
    scores = call.query @ call.spread(call.key).mT * call.scale + bias
    return scores.softmax(-1) @ call.spread(call.value)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    inputs = text(seed, TOKENS)
    found, _ = calls(inputs)
    rows: list[dict[str, float]] = []
    for call in found[::3]:
        wanted = heads(call, None)
        rows.append({name: error(heads(call, replace(way, seed=seed)), wanted) for name, way in WAYS.items()})
    numbers = {f"error, {name}": statistics.fmean(row[name] for row in rows) for name in WAYS}
    return min(numbers["error, blocks alone"], numbers["error, sample alone"]) - numbers["error, both"], numbers


CLAIM = Claim(
    key="P259",
    method="HyperAttention",
    says="Blocks of keys that a hash sorts to a query, and a sample of all others, together come near to attention.",
    paper_number="ChatGLM2 50% faster at 32k tokens, perplexity 6.3 instead of 5.6 (abstract)",
    setup=f"SmolLM2-135M, texts of {TOKENS} tokens, every third layer's own queries, keys and values, parts of {LEAST} "
    f"exact, blocks of {COST // 2} and {COST // 2} sampled columns in each square: relative L1 error of the heads, "
    f"against the better of blocks of {COST} and a sample of {COST} alone.",
    effect="error of the better part alone, minus error of both",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
