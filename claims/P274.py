"""DisenDiff: do new words draw their own things if their maps meet those of the kinds, and these part?"""

from __future__ import annotations

from dataclasses import replace

import torch

from claims._guided import LAID
from claims._learnt import LEARN, SHOWN, STEPS, TRIED, Roles, Shown, drawn, learnt, of_maps
from claims.ledger import Claim, run
from heedful.methods import DisenDiff

# where the two new words stand with the words for their kinds, in prompts that name the left thing first, or last
OWN: tuple[Roles, Roles] = (
    {"first": ((0, 2),), "second": ((2, 4),)},
    {"first": ((2, 4),), "second": ((0, 2),)},
)
CROSSED: tuple[Roles, Roles] = (
    {"first": ((0, 1), (3, 4)), "second": ((2, 3), (1, 2))},
    {"first": ((2, 3), (1, 2)), "second": ((0, 1), (3, 4))},
)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    shown = Shown.drawn(torch.Generator().manual_seed(100 + seed))
    method = DisenDiff(grid=LAID)
    ways = {"no loss": (None, OWN), "calibrated": (method, OWN), "calibrated to the other's kind": (method, CROSSED)}
    numbers: dict[str, float] = {}
    for name, (loss, roles) in ways.items():
        words = learnt(shown, loss, [roles] * SHOWN, seed)
        numbers |= {f"{what}, {name}": share for what, share in drawn(words, 200 + seed).items()}
        numbers[f"loss of maps, {name}"] = of_maps(words, shown, replace(method, weight=1.0), [OWN] * SHOWN, 300 + seed)
    best = max(numbers[f"own colour, {name}"] for name in ("no loss", "calibrated to the other's kind"))
    return numbers["own colour, calibrated"] - best, numbers


CLAIM = Claim(
    key="P274",
    method="DisenDiff",
    says="New words learnt from pictures of two things draw their own if their maps meet those of kinds that part.",
    paper_number="CLIP similarity to the things above other methods'; no one figure in the abstract",
    setup=f"A text-to-image transformer of 0.2M parameters on 16 x 16 pictures instead of SD 1.4; {SHOWN} pictures a "
    "seed of two things in new colours, always on the same sides, named by two new words, each before the word for "
    f"its shape, in either order. The words and cross-attention's keys and values are learnt in {LEARN} steps with the "
    f"authors' weight, at which maps move little. {TRIED} pictures of each of six prompts, {STEPS} steps, with one of "
    "the things or both, are judged by the nearest of all that can be. Against no loss on maps, and new words bound to "
    "the other's shape.",
    effect="share of things in their own colour where they are asked for, above the better of both controls",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
