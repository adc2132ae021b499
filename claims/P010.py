"""Attention whose heads look by chance: does it learn functions of sets from fewer examples than a plain random net?"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Generator, Tensor

from claims.ledger import Claim, run
from heedful.methods import RandomFeatureHeads
from heedful.nn import Attention

WIDTH, KEYS, HEADS = 12, 12, 96
TRAINED, TRIED = 2000, 4000
RIDGES = tuple(10.0**power for power in range(-6, 3))

Data = tuple[Tensor, Tensor, Tensor]  # queries [n d], keys [n k d], what is to be known [n]


def drawn(count: int, random: Generator, direction: Tensor) -> Data:
    """Vectors of length 1; wanted is the mean of how like the query a key is, times what a direction makes of it."""
    x = torch.nn.functional.normalize(torch.randn(count, KEYS + 1, WIDTH, generator=random), dim=-1)
    query, keys = x[:, 0], x[:, 1:]
    wanted = (torch.relu(WIDTH**0.5 * torch.einsum("nd,nkd->nk", query, keys)) * (keys @ direction)).mean(1)
    return query, keys, wanted


def attention(method: RandomFeatureHeads) -> Attention:
    """One layer whose heads all see the same queries, keys and values, and hand out what they gather."""
    layer = Attention(HEADS * WIDTH, HEADS, method, kv_heads=1, bias=False, kdim=WIDTH, vdim=WIDTH, batch_first=True)
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            torch.nn.init.eye_(projection.weight)
    return layer


def gathered(layer: Attention, data: Data) -> Tensor:
    query, keys, _ = data
    return layer(query.repeat(1, HEADS)[:, None], keys, keys)[0][:, 0]


def flat(weights: Tensor, data: Data) -> Tensor:
    """The control: as many features, of query and keys in a row."""
    query, keys, _ = data
    return torch.relu(torch.cat([query, keys.flatten(1)], 1) @ weights)


def error(features: list[Tensor], data: list[Data]) -> float:
    """Of the ridge regression that does best on a third of what may be seen, fitted to all, in shares of variance."""
    (seen, asked), (wanted, truth) = (x.double() for x in features), (x[2].double() for x in data)
    part = len(seen) * 2 // 3

    def fitted(x: Tensor, y: Tensor, ridge: float) -> Tensor:
        gram = x.T @ x
        return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double(), x.T @ y)

    def left(ridge: float) -> float:
        return float((seen[part:] @ fitted(seen[:part], wanted[:part], ridge) - wanted[part:]).square().mean())

    best = fitted(seen, wanted, min(RIDGES, key=left))
    return float((asked @ best - truth).square().mean() / truth.var())


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    random = Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=random), dim=0)
    data = [drawn(count, random, direction) for count in (TRAINED, TRIED)]
    weights = torch.randn((KEYS + 1) * WIDTH, HEADS * WIDTH, generator=random)
    found = {"a flat net": error([flat(weights, x) for x in data], data)}
    for name, mean in (("heads by chance", 0.0), ("heads by chance, like to like", 1.0)):
        layer = attention(RandomFeatureHeads(mean, seed))
        found[name] = error([gathered(layer, x) for x in data], data)
    errors = [found[name] for name in ("a flat net", "heads by chance", "heads by chance, like to like")]
    return min(math.log(a / b) for a, b in pairwise(errors)), found


CLAIM = Claim(
    key="P010",
    method="RandomFeatureHeads",
    says="Heads with random, frozen queries and keys learn functions of a set of keys from fewer examples than a "
    "random two-layer net, and fewer still where their matrices have a mean that lets like meet like.",
    paper_number="bounds on the samples that are needed; curves of the error on simulated data",
    setup=f"Ridge regression on {TRAINED} examples of a query and {KEYS} keys of {WIDTH} numbers; wanted is the mean "
    f"over keys of relu(query key) times what a direction makes of the key. Features of {HEADS} heads, of as many with "
    "a mean of one identity, and as many of a random net that is told query and keys in a row. Error on fresh ones.",
    effect="the smaller logarithm of the error's ratio: net to heads, and heads to heads with a mean",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
