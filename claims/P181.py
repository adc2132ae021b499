"""Heads that look at one neighbour of each patch: do they look there in other pictures, and at no other neighbour?"""

from __future__ import annotations

import torch
from torch import Tensor

from claims._scenes import crop, model
from claims.ledger import Claim, run
from heedful import attach
from heedful.methods import OffsetLocalHeads
from heedful.methods.observe.offset_local_heads import Aligned

SHOWN = 8  # crops in which heads are sought, and as many of the other photograph in which they are looked at
METHOD = OffsetLocalHeads(reach=1)


def _seen(pixels: Tensor) -> Aligned:
    with attach(model(), METHOD) as seen, torch.no_grad():
        seen(pixel_values=pixels)
        found: Aligned = seen[METHOD]
    return found


def _crops(name: str, draw: torch.Generator) -> Tensor:
    return torch.stack([crop(name, draw, 150, 420) for _ in range(SHOWN)])


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw = torch.Generator().manual_seed(seed)
    heads = _seen(_crops("china", draw)).heads
    elsewhere = _seen(_crops("flower", draw))
    there, others = [], []
    for (layer, head), ((down, right), _) in heads.items():
        around = elsewhere.around[layer, head].clone()
        there.append(float(around[1 + down, 1 + right]))
        around[1 + down, 1 + right] = -1.0
        others.append(float(around.max()))
    gaps = [a - b for a, b in zip(there, others, strict=True)] or [0.0]
    numbers = {"heads": float(len(heads)), "heads that peak there again": float(sum(gap > 0 for gap in gaps))}
    numbers |= {"share at the neighbour": sum(there) / max(1, len(there)), "at the best other": sum(others) / len(gaps)}
    return sum(gaps) / len(gaps), numbers


CLAIM = Claim(
    key="P181",
    method="OffsetLocalHeads",
    says="Vision transformers have heads that attend to one adjacent patch, always in the same direction.",
    paper_number="none given: seen in ViTs of every kind of supervision (abstract)",
    setup=f"DINOv2-S/14, which is none of the paper's models; heads that peak at one neighbour with 10 % or more in "
    f"{SHOWN} crops of one photograph, looked at in {SHOWN} crops of another. Against the best of the other eight "
    "places around and at the patch: a head that is merely local would look there as much.",
    effect="share of attention at the head's own neighbour above the best other place",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
