"""head_importance: do heads whose removal moves a vision transformer's answers most matter most to its accuracy?"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor

import heedful
from claims._digits import HELD_OUT, LAYERS, digits, placed, taught
from claims.ledger import Claim, run
from heedful.core.method import Stack
from heedful.explaining import head_importance

STEPS, HEADS, CHOSEN, DRAWS = 300, 4, 4, 8


def _ranks(x: Tensor) -> Tensor:
    return x.flatten().argsort().argsort().double()


def _alike(x: Tensor, y: Tensor | None) -> float:
    """Spearman's correlation."""
    return float("nan") if y is None else float(torch.corrcoef(torch.stack([_ranks(x), _ranks(y)]))[0, 1])


def _accuracy(model: Any, images: Tensor, labels: Tensor, without: Iterable[tuple[int, int]]) -> float:
    with heedful.ablate(model, without) as found, torch.no_grad():
        return float((found(pixel_values=images).logits.argmax(-1) == labels).double().mean())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, whole = taught(Stack(()), seed, STEPS)
    images, labels = digits()
    draw = torch.Generator().manual_seed(seed)
    tried = torch.randperm(len(images), generator=draw)[:HELD_OUT]  # as in training: none of them was learned from
    shown, names = placed(images[tried], *torch.randint(3, (2, HELD_OUT), generator=draw)), labels[tried]
    half = HELD_OUT // 2
    found = head_importance(model, [{"pixel_values": shown[:half], "labels": names[:half]}])
    every = list(product(range(LAYERS), range(HEADS)))
    drawn = [[every[i] for i in torch.randperm(len(every), generator=draw)[:CHOSEN]] for _ in range(DRAWS)]
    accuracy = {
        "the most important": [_accuracy(model, shown[half:], names[half:], found.top(CHOSEN))],
        "the least": [_accuracy(model, shown[half:], names[half:], found.top(len(every))[-CHOSEN:])],
        "any": [_accuracy(model, shown[half:], names[half:], one) for one in drawn],
    }
    numbers = {f"accuracy without {name}": sum(each) / len(each) for name, each in accuracy.items()}
    numbers["accuracy"] = whole
    others = {"probability": found.probability, "loss": found.loss}
    numbers |= {f"rank correlation with {name}": _alike(found.divergence, x) for name, x in others.items()}
    return numbers["accuracy without any"] - numbers["accuracy without the most important"], numbers


CLAIM = Claim(
    key="P020",
    method="head_importance",
    says="Heads that are found by pruning them one at a time are the ones that a vision transformer hangs on.",
    paper_number="none in the abstract; its figures are read by experts",
    setup=f"{LAYERS}-layer vision transformers of {HEADS} heads a layer, trained on placed digits for {STEPS} steps; "
    f"importance by the divergence of answers on half of the held-out digits, then {CHOSEN} heads at once set to zero "
    f"on the other half: the most important, the least, or any ({DRAWS} draws). The paper was read in its abstract "
    "alone, which names several measures by pruning and no formula; how far three such agree is in the details. Its "
    "autoencoder of patterns is not here; its distances are OffsetLocalHeads' and AttentionProfile's.",
    effect="accuracy lost without the most important heads, more than without as many others",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
