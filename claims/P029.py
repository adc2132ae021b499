"""CompositionScore: do the few directions that weights name as read by induction heads carry what these need?"""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from claims.ledger import Claim, run
from heedful import attach, fit, models, operate
from heedful.core.entry import Layer
from heedful.core.figures import Head
from heedful.core.kinds.weights import HeadWeights, Surgery
from heedful.core.paper import Paper
from heedful.methods.explain.composition_score import CompositionScore
from heedful.methods.observe.induction_heads import Copying, InductionHeads

PERIOD, TEXTS, READERS, EACH, DRAWS = 48, 8, 5, 4, 3
WORDS = torch.arange(1000, 40000)


class Without(Surgery):
    """Takes directions that heads write out of their output projections."""

    paper = Paper("P029", "Talking Heads", "Jack Merullo, Carsten Eickhoff, Ellie Pavlick", 2024, "2406.09519")
    channels: tuple[tuple[int, int, int], ...] = ()  # layer, head, component

    def operate(self, weights: HeadWeights, layer: Layer) -> HeadWeights:
        o, shared = weights.o.clone(), weights.heads // weights.kv_heads
        for head in {h for n, h, _ in self.channels if n == layer.number}:
            own = o[:, head]
            u = torch.linalg.svd(own @ weights.v[head // shared]).U
            gone = u[:, [i for n, h, i in self.channels if (n, h) == (layer.number, head)]]
            o[:, head] = own - gone @ (gone.T @ own)
        return HeadWeights(
            weights.q, weights.k, weights.v, o, weights.q_bias, weights.k_bias, weights.v_bias, weights.o_bias
        )


@cache
def fitted() -> tuple[models.Loaded, CompositionScore]:
    loaded = models.default()
    return loaded, fit(CompositionScore(), loaded.model, ())


def copying(model: torch.nn.Module, seed: int) -> Copying:
    method = InductionHeads(period=PERIOD, repeats=2, texts=TEXTS, seed=seed)
    with attach(model, method) as attached:
        for probe in method.probes(WORDS, 4 * PERIOD):
            attached(input_ids=probe.tokens, logits_to_keep=1)
        found: Copying = attached[method]
    return found


@torch.no_grad()
def loss(model: torch.nn.Module, ids: Tensor) -> float:
    """Of the tokens that come for the second time, but the first of them."""
    logits = model(ids).logits[:, PERIOD:-1]
    return float(cross_entropy(logits.flatten(0, 1), ids[:, PERIOD + 1 :].flatten()))


def previous_first(scores: Tensor, rows: Iterable[int], previous: dict[Head, float], heads: list[Head]) -> float:
    """How often a head that looks at the token before scores above one of as early a layer that does not."""
    wins = total = 0.0
    for r in rows:
        early = [w for w, head in enumerate(heads) if head[0] < heads[r][0]]
        good = scores[r, [w for w in early if heads[w] in previous]]
        rest = scores[r, [w for w in early if heads[w] not in previous]]
        wins += float((good[:, None] > rest).sum())
        total += len(good) * len(rest)
    return wins / total


def measure(seed: int) -> tuple[float, dict[str, float]]:
    (model, _, _), method = fitted()
    draw, found = random.Random(seed), copying(model, seed)
    readers = list(found.heads("induction", 0.0))[:READERS]
    channels = {(*c.writer, c.component) for reader in readers for c in method.channels(EACH, "keys", reader=reader)}
    size = model.config.head_dim
    source = torch.Generator().manual_seed(10_000 + seed)
    ids = WORDS[torch.randint(len(WORDS), (TEXTS, PERIOD), generator=source)].repeat(1, 2)
    numbers = {"channels": float(len(channels)), "loss": loss(model, ids)}
    numbers["loss without the channels"] = loss(operate(model, Without(tuple(sorted(channels)))), ids)
    others = []
    for _ in range(DRAWS):
        free = {(n, h): [i for i in range(size) if (n, h, i) not in channels] for n, h, _ in channels}
        picked = tuple(
            (n, h, i)
            for n, h in sorted(free)
            for i in draw.sample(free[n, h], sum((n, h) == (m, g) for m, g, _ in channels))
        )
        others.append(loss(operate(model, Without(picked)), ids))
    numbers["loss without other directions of the same heads"] = sum(others) / DRAWS
    heads = [(n, h) for n, h in method.fitted["heads"].tolist()]  # type: ignore[index]
    previous, rows = found.heads("previous", 0.3), [heads.index(reader) for reader in readers]
    for name, whole in (("best component", False), ("whole head", True)):
        scores = method.between("keys", whole=whole)
        numbers[f"previous-token heads first, {name}"] = previous_first(scores, rows, previous, heads)
    return numbers["loss without the channels"] - sum(others) / DRAWS, numbers


CLAIM = Claim(
    key="P029",
    method="CompositionScore",
    says="Heads speak to heads of later layers through a few directions, which the weights alone tell once a head's "
    "output is decomposed.",
    paper_number="none of ours; editing the channels improves the recall of lists by over 20 %",
    setup=f"SmolLM2-135M, random tokens twice; the {READERS} heads that do most induction, and for each the {EACH} "
    "strongest channels into its keys; the loss on the second copy without these directions in what their writers "
    f"write, against as many other directions of the same writers, {DRAWS} draws. New tokens a seed, for both.",
    effect="nats of loss that losing the channels costs more than losing others",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
