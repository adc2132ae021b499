"""SHRP: of an encoder's heads, are those that tokens choose most often the ones to keep?"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from claims._digits import BATCH, HELD_OUT, Reads, digits, placed, taught
from claims.ledger import Claim, run
from heedful import fit, operate
from heedful.authoring import Fitted
from heedful.methods import SHRP, PruneHeads
from heedful.methods.compress.prune._pruner import HeadPruner

SHARE, LAYERS, HEADS, STEPS, AFTER, DRAWS = 0.75, 4, 4, 600, 60, 3


def shown(seed: int) -> list[dict[str, Tensor]]:
    """Batches of digits that the model was trained on."""
    by = torch.Generator().manual_seed(seed)
    images, labels = digits()
    kept = torch.randperm(len(images), generator=by)[HELD_OUT:]  # as `taught` deals them
    batches = []
    for _ in range(4):
        chosen = kept[torch.randint(len(kept), (BATCH,), generator=by)]
        places = torch.randint(3, (2, BATCH), generator=by)
        batches.append({"pixel_values": placed(images[chosen], *places), "labels": labels[chosen]})
    return batches


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, whole = taught(Reads(), seed, STEPS)

    def left(how: HeadPruner) -> float:
        """Accuracy without the heads that go, when what is left was trained a little on."""
        return 100 * taught(Reads(), seed, AFTER, operate(model, how))[1]

    def ranked(number: int) -> HeadPruner:
        """Heads in an order that is drawn."""
        draw = torch.Generator().manual_seed(100 * seed + number)
        order = {str(layer): torch.rand(HEADS, generator=draw) for layer in range(LAYERS)}
        return PruneHeads(SHARE, importance=Fitted(order))

    found = {
        "whole": 100 * whole,
        "most used": left(fit(SHRP(SHARE, seed=seed), model, shown(seed))),
        "by gradient": left(fit(PruneHeads(SHARE), model, shown(seed))),
        "at random": statistics.fmean(left(ranked(number)) for number in range(DRAWS)),
    }
    return found["most used"] - found["at random"], found


CLAIM = Claim(
    key="P037",
    method="SHRP",
    says="Of the heads of an encoder those are worth keeping that tokens are routed to most often, one to each.",
    paper_number="93 % of BERT-base's accuracy with 48 % fewer parameters, 84 % accuracy where 11 of 12 layers are "
    "pruned (abstract)",
    setup=f"A vision transformer of {LAYERS} layers of {HEADS} heads, {STEPS} steps on handwritten digits a seed; one "
    f"head of each layer is kept and the model is trained {AFTER} steps more. Kept are the most used ones, those by "
    f"gradient, as PruneHeads, or {DRAWS} draws, whose mean is the control. Accuracy on held-out digits. Steps were "
    "made three times as many after one try on another seed, whose whole model named a third of the digits, and lost "
    "9 points by the most used heads.",
    effect="points of accuracy above heads kept at random",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
