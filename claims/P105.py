"""CONFORM: do colours go to their own things if the maps of words that belong together are drawn together?"""

from __future__ import annotations

import torch

from claims._guided import LAID, PLACES, STEPS, guided, loosened, of_two_colours, plain
from claims._pictures import right
from claims.ledger import Claim, run
from heedful.methods import CONFORM

PICTURES = 24
TOGETHER = {"first": ((0, 2),), "second": ((2, 4),)}  # colour and shape of the left, and of the right
CROSSED = {"first": ((0, 1), (3, 4)), "second": ((1, 3),)}  # the colour of one with the shape of the other


def measure(seed: int) -> tuple[float, dict[str, float]]:
    by = torch.Generator().manual_seed(100 + seed)
    words, noise = of_two_colours(PICTURES, by)
    context = loosened(words)
    method = CONFORM(grid=LAID)
    drawn = {
        "plain": plain(noise, context),
        "guided": guided(method, noise, context, TOGETHER),
        "moved anywhere": guided(method, noise, context, TOGETHER, by),
        "guided by crossed groups": guided(method, noise, context, CROSSED),
    }
    numbers = {"pictures": float(len(words))}
    for name, pictures in drawn.items():
        numbers |= {f"{concept}s right, {name}": share for concept, share in right(pictures, words).items()}
    controls = ("plain", "moved anywhere", "guided by crossed groups")
    best = max(numbers[f"colours right, {name}"] for name in controls)
    return numbers["colours right, guided"] - best, numbers


CLAIM = Claim(
    key="P105",
    method="CONFORM",
    says="Drawing together the maps of words that belong together, and apart those of others, binds colours to things.",
    paper_number="CLIP similarity to the text above attend-and-excite's; no one figure",
    setup=f"A text-to-image transformer of 0.2M parameters on 16 x 16 pictures of two things instead of SD 1.5. It "
    f"binds by itself, so of what tells whose word it is {PLACES} is left, at which a trial took every fifth colour "
    f"from the other thing. Of {PICTURES} pictures a seed those of two colours, {STEPS} steps, one move in each of the "
    "first half of them; rate, temperature and smoothing are the authors'. Against no moves, moves of the same length "
    "in random directions, and groups that cross the two things.",
    effect="share of colours that are their thing's, above the best of the controls",
    measure=measure,
    seeds=8,
)

if __name__ == "__main__":
    run(CLAIM)
