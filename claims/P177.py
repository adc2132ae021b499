"""Textual localization: do new words draw their own things if their maps are taught where these stand?"""

from __future__ import annotations

import torch

from claims._learnt import LEARN, SHOWN, STEPS, TRIED, Roles, Shown, drawn, learnt, of_maps, spans
from claims.ledger import Claim, run
from heedful.core.method import Stack
from heedful.methods import TextualLocalization


def _guided(first: str = "left", second: str = "right") -> Stack:
    return TextualLocalization(0.5, "first", first) | TextualLocalization(0.5, "second", second)


def _roles(shown: Shown) -> list[tuple[Roles, Roles]]:
    """Of each picture, where its things stand, and where the word for the one on the left does: first or last."""
    found: list[tuple[Roles, Roles]] = []
    for left, right in shown.places:
        masks = {"left": spans(left), "right": spans(right)}
        found.append(
            (
                {"first": ((0, 1),), "second": ((2, 3),)} | masks,
                {"first": ((2, 3),), "second": ((0, 1),)} | masks,
            )
        )
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    shown = Shown.drawn(torch.Generator().manual_seed(100 + seed))
    roles = _roles(shown)
    ways = {
        "no guidance": None,
        "hard guidance": _guided(),
        "guidance to the other's mask": _guided("right", "left"),
    }
    numbers: dict[str, float] = {}
    for name, method in ways.items():
        words = learnt(shown, method, roles, seed)
        numbers |= {f"{what}, {name}": share for what, share in drawn(words, 200 + seed).items()}
        numbers[f"distance of maps from masks, {name}"] = of_maps(words, shown, _guided(), roles, 300 + seed)
    best = max(numbers[f"own colour, {name}"] for name in ("no guidance", "guidance to the other's mask"))
    return numbers["own colour, hard guidance"] - best, numbers


CLAIM = Claim(
    key="P177",
    method="TextualLocalization",
    says="New words learnt from pictures of two things draw their own if their maps are taught where these stand.",
    paper_number="CLIP similarity to the thing 7.04 % above Custom Diffusion's for one, and 8.13 % for several",
    setup=f"A text-to-image transformer of 0.2M parameters on 16 x 16 pictures instead of SD 1.5; {SHOWN} pictures a "
    "seed of two things in new colours, always on the same sides, named by two new words in either order. The words "
    f"and cross-attention's keys and values are learnt in {LEARN} steps, from the whole of the pictures, with hard "
    f"guidance. {TRIED} pictures of each of six prompts, {STEPS} steps, with one of the things or both, are judged by "
    "the nearest of all that can be. Against no guidance, and the other thing's mask. Beside it how far maps are "
    "from masks. Soft guidance is not measured.",
    effect="share of things in their own colour where they are asked for, above the better of both controls",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
