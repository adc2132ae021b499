"""spans: do spans of a text that attention makes serve later queries better than blocks of one size?"""

from __future__ import annotations

import random
import statistics

import torch
from torch import Tensor

from claims._sparse import calls, own_text, weights
from claims.ledger import Claim, run
from heedful.explaining.spanning import cut

TOKENS, SINKS, READ, CHUNK, BUDGET, LONGEST = 388, 4, 256, 16, 64, 32
LAYERS = range(1, 30, 4)

Places = list[tuple[int, int]]


def _served(places: Places, query: Tensor, key: Tensor, true: Tensor) -> float:
    """The share of the weight on what was read that goes to the best places, within the budget.

    A place is told by its mean key and asked for by the mean query, all heads together.
    """
    told = torch.stack([key[:, a:b].mean(1) for a, b in places], 1)  # [h places d]
    order = (told @ query.mean(1)[..., None])[..., 0].sum(0).argsort(descending=True)
    room, kept = BUDGET, torch.zeros(READ, dtype=torch.bool)
    for number in order.tolist():
        a, b = places[number]
        kept[a : min(b, a + room)] = True
        room -= min(b - a, room)
        if not room:
            break
    return float((true * kept).sum() / true.sum())


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    found, _ = calls(own_text(seed, TOKENS))
    rows: list[dict[str, float]] = []
    for layer in LAYERS:
        call = found[layer]
        maps = weights(call)[0]  # [h q k]
        query, key = call.query[0], call.spread(call.key)[0]
        read = slice(SINKS, SINKS + READ)
        spans = list(cut(maps[:, read, read].sum(0), LONGEST)[0])
        lengths = [b - a for a, b in spans]
        random.Random(seed).shuffle(lengths)
        mixed, size = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(len(lengths))], -(-READ // len(spans))
        blocks = [(a, min(a + size, READ)) for a in range(0, READ, size)]
        for start in range(SINKS + READ, TOKENS, CHUNK):
            rest = slice(start, start + CHUNK)
            asked = query[:, rest], key[:, read], maps[:, rest, read]
            rows.append({"spans": _served(spans, *asked), "blocks": _served(blocks, *asked)})
            rows[-1] |= {"lengths in another order": _served(mixed, *asked), "tokens a span": READ / len(spans)}
    numbers = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}
    return numbers["spans"] - numbers["blocks"], numbers


CLAIM = Claim(
    key="P080",
    method="spans",
    says="Spans that a text's own attention makes are better units to retrieve than blocks of one size.",
    paper_number="none in the abstract; needle, InfiniteBench and RULER",
    setup=f"SmolLM2-135M, every fourth layer. Behind {SINKS} sinks, which the authors always keep, {READ} tokens of a "
    f"help text, another for each seed, are cut into spans by their map, no triangle wider than {LONGEST}, or into "
    f"blocks of the same mean length. Each {CHUNK} of the {TOKENS - READ - SINKS} queries that follow choose {BUDGET} "
    "tokens together, by mean query and mean key, all heads at once. Beside them, spans of the same lengths in another "
    "order. (Begun with the sinks among the tokens: -0.09 on a text that is not among these, most of it the first "
    "token's weight.)",
    effect="share of the true weight on the first tokens that is retrieved, by spans above that by blocks",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
