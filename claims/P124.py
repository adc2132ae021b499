"""likeness: do two trainings come to the same subspaces, and not to the same neurons?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from claims._tiny_lm import Trained, batch, fresh
from claims.ledger import Claim, run
from heedful import attach
from heedful.authoring import Call, Cat, Method, Site, reads
from heedful.explaining import Likeness, likeness
from heedful.explaining.likening import PAPER, alike

STEPS, TEXTS, LAYERS = 150, 16, 2


class _States(Method):
    """Keeps the residual stream, for this experiment only."""

    paper = PAPER

    @reads(Site.RESIDUAL)
    def keep(self, stream: Tensor, call: Call) -> Cat:
        return Cat.of("x", stream.flatten(0, 1))


def _states(model: Any, ids: Tensor) -> list[Tensor]:
    with attach(model, _States()) as seen, torch.no_grad():
        seen(input_ids=ids, use_cache=False)
        return [stat.value[0] for stat in seen[_States()].values()]


def _trained(seed: int) -> Any:
    trained = Trained(None, seed, STEPS, LAYERS)
    trained.run.close()
    return trained.model


def _equal(found: Likeness) -> dict[str, float]:
    """Likeness of layers at the same depth, means over depth."""
    return {level: float(getattr(found, level).diagonal().mean()) for level in ("neurons", "layers", "heads")}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    one, other = _trained(2 * seed), _trained(2 * seed + 1)
    before = fresh(2 * seed + 1, LAYERS).eval()
    draw = torch.Generator().manual_seed(10_000 + seed)
    ids = batch(draw, held_out=True, rows=TEXTS)
    inputs = [{"input_ids": ids, "use_cache": False}]
    found = _equal(likeness(one, other, inputs))
    untrained = _equal(likeness(one, before, inputs))
    turned = []
    for x, y in zip(_states(one, ids), _states(other, ids), strict=True):
        turn = torch.linalg.qr(torch.randn(y.shape[1], y.shape[1], generator=draw)).Q
        turned.append(alike(x, y @ turn)[0])
    numbers = {f"{level}, two trainings": value for level, value in found.items()}
    numbers |= {f"{level}, against no training": value for level, value in untrained.items()}
    numbers["neurons, the other turned at random"] = sum(turned) / len(turned)
    subspaces = found["layers"] - untrained["layers"]
    neurons = found["neurons"] - numbers["neurons, the other turned at random"]
    return subspaces - neurons, numbers | {"subspaces above chance": subspaces, "neurons above chance": neurons}


CLAIM = Claim(
    key="P124",
    method="likeness",
    says="Models trained apart come to similar subspaces of representation, and not to similar single neurons.",
    paper_number="none in the abstract",
    setup=f"Pairs of {LAYERS}-layer byte models trained {STEPS} steps on Python's documentation, from other weights "
    f"and in another order of text; no speech. On {TEXTS} held-out sequences, others for each seed, layers of the same "
    "depth: linear CKA above that with a model before its training, less the best correlation of neurons above that "
    "with the same states turned at random, which have no neurons of their own. Begun with four layers "
    "and 200 steps and cut for time after the first seed, which had 0.40.",
    effect="likeness of subspaces above chance less that of neurons above chance",
    measure=measure,
    strong=0.1,
)

if __name__ == "__main__":
    run(CLAIM)
